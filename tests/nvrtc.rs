//! Our kernels for GPUs compile for those that libtorch is built for, by the compiler that torch's wheel brings.

use xorl_dist::{
    device::{DeviceError, kernels::compile},
    ops::cuda::SOURCE,
};

#[test]
fn kernels_compile() {
    for generation in [80, 90, 100] {
        let ptx = compile(SOURCE, generation).unwrap().into_string().unwrap();
        assert!(
            ptx.contains(&format!(".target sm_{generation}")) && ptx.contains(".entry norm_forward_bf16")
        );
        // Rows move 16 bytes at a time, and no array of a thread's is in memory.
        assert!(ptx.contains("st.global.cg.v4") && !ptx.contains(".local"), "{ptx}");
        // Codes are loaded as whole words, past the cache that is written; bf16 leave 16 bytes at a time.
        for (format, codes) in [("nf4", "u32"), ("nvfp4", "u32"), ("block_fp8", "v2.u32")] {
            let (_, kernel) = ptx.split_once(&format!(".entry decode_{format}_bf16(")).unwrap();
            let kernel = kernel.split(".entry").next().unwrap();
            let loads = kernel.matches(&format!("ld.global.nc.{codes}")).count();
            assert_eq!((loads, kernel.matches("st.global.cg.v4").count()), (4, 4), "{kernel}");
            assert!(kernel.matches("cvt.rn.bf16x2.f32").count() >= 16, "{kernel}");
        }
        let wrong = compile(&SOURCE.replace("warp_sum(squares)", "sum(squares)"), generation).unwrap_err();
        assert!(matches!(wrong, DeviceError::Compile { .. }), "{wrong}");
        assert!(wrong.to_string().contains("identifier \"sum\" is undefined"), "{wrong}");
    }
}
