//! Memory of this host that processes may still take: MemAvailable of the kernel, less where a control group (v1 or v2)
//! has a limit.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A name of this host that its containers share.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// Bytes that processes of this host may still take. `None`: the kernel does not tell.
pub fn free_memory() -> Option<u64> {
    free_below(Path::new("/"))
}

/// [`free_memory`] by the files of `/proc` and `/sys` below `root`.
fn free_below(root: &Path) -> Option<u64> {
    let read = |path: PathBuf| fs::read_to_string(root.join(path)).ok();
    let kernel = available(&read("proc/meminfo".into())?)?;
    let groups = read("proc/self/cgroup".into()).unwrap_or_default();
    let allowed = groups_of(&groups).into_iter().filter_map(|(folder, names)| {
        let of_group = |name: &str| read(folder.join(name));
        left(&of_group(names.limit)?, &of_group(names.usage)?, &of_group("memory.stat")?)
    });
    allowed.chain([kernel]).min()
}

/// MemAvailable of /proc/meminfo.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The files of a control group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Names {
    limit: &'static str,
    usage: &'static str,
}

/// The folders, without the leading `/`, of the memory control groups that bound a process whose /proc/self/cgroup is
/// `text`: its own, those above, and in a container, which does not see these, the root.
fn groups_of(text: &str) -> Vec<(PathBuf, Names)> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, names) = match controllers {
            "" => ("sys/fs/cgroup", Names { limit: "memory.max", usage: "memory.current" }),
            _ if controllers.split(',').any(|name| name == "memory") => {
                let (limit, usage) = ("memory.limit_in_bytes", "memory.usage_in_bytes");
                ("sys/fs/cgroup/memory", Names { limit, usage })
            }
            _ => continue,
        };
        let above = Path::new(path.trim_start_matches('/')).ancestors();
        found.extend(above.map(|path| (Path::new(root).join(path), names)));
    }
    found
}

/// Bytes that a control group leaves: its limit less what it uses and cannot drop. `None`: no limit.
///
/// v1 counts the groups below in usage, and in `total_inactive_file` alone; v2 counts them everywhere.
fn left(limit: &str, usage: &str, stat: &str) -> Option<u64> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let of = |name: &str| stat.lines().find_map(|line| number(line.strip_prefix(name)?));
    let cache = of("total_inactive_file ").or_else(|| of("inactive_file ")).unwrap_or(0);
    Some(number(limit)?.saturating_sub(number(usage)?.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1 << 30;

    /// A root with `available` bytes, the text of /proc/self/cgroup, and files of control groups.
    fn free(available: u64, cgroup: &str, files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write(
            "proc/meminfo",
            &format!("MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:  {} kB\n", available >> 10),
        );
        write("proc/self/cgroup", cgroup);
        files.iter().for_each(|(path, text)| write(&format!("sys/fs/cgroup/{path}"), text));
        free_below(root.path())
    }

    /// Files of a group: limit, usage, and cache that it can drop.
    fn v2(limit: &'static str, usage: &'static str, stat: &'static str) -> [(&'static str, &'static str); 3] {
        [("memory.max", limit), ("memory.current", usage), ("memory.stat", stat)]
    }

    fn in_folder<const N: usize>(
        folder: &str,
        files: [(&str, &'static str); N],
    ) -> Vec<(String, &'static str)> {
        files.map(|(name, text)| (format!("{folder}{name}"), text)).to_vec()
    }

    fn given(files: &[Vec<(String, &'static str)>]) -> Vec<(String, &'static str)> {
        files.concat()
    }

    fn free_in(available: u64, cgroup: &str, files: &[Vec<(String, &'static str)>]) -> Option<u64> {
        let files = given(files);
        let files: Vec<_> = files.iter().map(|(path, text)| (path.as_str(), *text)).collect();
        free(available, cgroup, &files)
    }

    #[test]
    fn the_kernel_tells_what_is_free_where_no_group_has_a_limit() {
        assert_eq!(free(8 * GB, "", &[]), Some(8 * GB));
        assert_eq!(free(8 * GB, "0::/a\n", &[]), Some(8 * GB));
        let none = in_folder("a/", v2("max\n", "5\n", "inactive_file 0\n"));
        assert_eq!(free_in(8 * GB, "0::/a\n", &[none]), Some(8 * GB));
        assert_eq!(free_below(tempfile::tempdir().unwrap().path()), None);
    }

    #[test]
    fn the_tightest_of_nested_groups_counts_without_the_cache_that_it_can_drop() {
        let own = || in_folder("job/rank/", v2("4000000000\n", "1000000000\n", "inactive_file 250000000\n"));
        let above = |limit| in_folder("job/", v2(limit, "2000000000\n", "anon 7\ninactive_file 0\n"));
        let cgroup = "0::/job/rank\n";
        assert_eq!(free_in(8 * GB, cgroup, &[own(), above("max\n")]), Some(3_250_000_000));
        assert_eq!(free_in(8 * GB, cgroup, &[own(), above("5000000000\n")]), Some(3_000_000_000));
        assert_eq!(free_in(1 << 20, cgroup, &[own(), above("5000000000\n")]), Some(1 << 20));
        assert_eq!(
            free_in(8 * GB, cgroup, &[own(), above("1000000000\n")]),
            Some(0),
            "more in use than allowed"
        );
        // A container does not see its own path, but its limit at the root.
        let root = in_folder("", v2("900\n", "300\n", "inactive_file 100\n"));
        assert_eq!(free_in(8 * GB, "0::/\n", &[root]), Some(700));
    }

    #[test]
    fn groups_of_version_one_count_as_well() {
        let files = |stat| {
            [("memory.limit_in_bytes", "4000\n"), ("memory.usage_in_bytes", "3000\n"), ("memory.stat", stat)]
        };
        let cgroup = "5:cpu,memory:/c\n3:cpuset:/d\n";
        let own = in_folder("memory/c/", files("inactive_file 30\ntotal_inactive_file 500\n"));
        // Without a limit the root has the largest number of pages.
        let root = [
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("memory.usage_in_bytes", "9000\n"),
            ("memory.stat", "inactive_file 0\n"),
        ];
        assert_eq!(free_in(8 * GB, cgroup, &[own, in_folder("memory/", root)]), Some(1500));
        let own = in_folder("memory/c/", files("inactive_file 30\n"));
        assert_eq!(free_in(8 * GB, cgroup, &[own]), Some(1030));
    }

    #[test]
    fn this_host_tells_its_memory() {
        assert!(free_memory().is_some_and(|free| free > 1 << 20));
    }
}
