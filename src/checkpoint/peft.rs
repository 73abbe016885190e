//! Adapters as HF PEFT loads them: `adapter_config.json` and `adapter_model.safetensors`, fp32, with HF's split names
//! also for fused targets. Adapters of routed experts are stored as `target_parameters` (see `experts`), or in a form
//! of serving stacks (see `stored`).

use super::{
    CheckpointError,
    adapter_config::{AdapterConfig, CONFIG_FILE, Names, read_config},
    adapter_file::{AdapterFile, Entry, WEIGHTS_FILE},
    experts, io,
    stored::{Layout, Stored},
};
use crate::{
    config::ExportFormat,
    console::first_of,
    hub::HubId,
    lora::{Factor, LoraShape, LoraShapes, MoeNames, Site, targets::Projection},
};
use fail::fail_point;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

/// One adapter as a run trains it: an independent leaf, or a fused target of several leaves with one A.
#[derive(Clone, Debug, PartialEq)]
pub struct LogicalAdapter {
    /// Dotted path of the parent: `model.layers.0.self_attn`.
    pub parent: String,
    /// Leaves with their widths, in the order of B's rows.
    pub leaves: Vec<(String, usize)>,
    pub shape: LoraShape,
    pub input: usize,
    /// Count of experts with such an adapter each: the leading dimension of A and B.
    pub experts: Option<usize>,
    /// Names of the experts in the model's files.
    pub names: MoeNames,
    /// The factor that is the same for all experts.
    pub shared: Option<Factor>,
    /// `[rank, input]`
    pub a: Vec<f32>,
    /// `[Σ widths, rank]`
    pub b: Vec<f32>,
    /// `[Σ widths]`, with magnitudes.
    pub magnitude: Vec<f32>,
}

impl LogicalAdapter {
    /// The adapter of `site`, without values.
    pub fn of(site: &Site, shape: LoraShape) -> Self {
        let leaves = site.leaves.iter().map(|(leaf, width)| (leaf.to_string(), *width)).collect();
        let (a, b, magnitude) = (Vec::new(), Vec::new(), Vec::new());
        let experts = site.experts.map(|experts| experts.count);
        let names = site.experts.map_or(MoeNames::MLP, |experts| experts.names);
        let (parent, shared) = (site.parent.clone(), site.shared);
        Self { parent, leaves, shape, input: site.input, experts, names, shared, a, b, magnitude }
    }

    /// Rows of B.
    pub(super) fn output(&self) -> usize {
        self.leaves.iter().map(|(_, width)| width).sum()
    }
}

impl AdapterConfig {
    /// The configuration of `adapters` in `format`, with their targets, and patterns for those that differ from
    /// `common`.
    pub fn new(
        common: LoraShape,
        base: Option<String>,
        adapters: &[LogicalAdapter],
        format: ExportFormat,
    ) -> Self {
        let groups = groups_of(adapters, format);
        let (mut modules, mut parameters) = (BTreeSet::new(), BTreeSet::new());
        let mut patterns = experts::patterns(&groups, common);
        let as_modules =
            |adapter: &&LogicalAdapter| adapter.experts.is_none() || format != ExportFormat::Peft;
        for adapter in adapters.iter().filter(as_modules) {
            // PEFT drops MLPs that are targeted as modules beside fused experts: parameters of the experts have the
            // same leaf names.
            let as_parameters = adapter.parent.split_once(".mlp").filter(|_| !groups.is_empty());
            for (leaf, _) in &adapter.leaves {
                match as_parameters {
                    Some((_, rest)) => parameters.insert(format!("mlp{rest}.{leaf}.weight")),
                    None if adapter.experts.is_some() => modules.insert(adapter.names.leaf(leaf).to_owned()),
                    None => modules.insert(leaf.clone()),
                };
            }
            if adapter.shape != common {
                let suffix = if as_parameters.is_some() { ".weight" } else { "" };
                let stored = Layout::from(format).tensors(adapter);
                let paths = stored.iter().map(|stored| format!("{}{suffix}", stored.module()));
                patterns.extend(paths.map(|path| (path.replace('.', r"\."), adapter.shape)));
            }
        }
        parameters.extend(experts::parameters(&groups));
        let ranks = patterns.iter().filter(|(_, shape)| shape.rank != common.rank);
        let alphas = patterns.iter().filter(|(_, shape)| shape.alpha != common.alpha);
        // PEFT has the revision of a hub's model in a field of its own.
        let id = base.as_deref().and_then(HubId::parse).filter(|id| id.revision.is_some());
        let (base, revision) = id.map_or((base, None), |id| (Some(id.name), id.revision));
        Self {
            r: common.rank,
            lora_alpha: common.alpha,
            use_rslora: common.use_rslora,
            use_dora: common.use_dora,
            target_modules: Names::Ends(modules.into_iter().collect()),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            lora_dropout: 0.0,
            target_parameters: parameters.into_iter().collect(),
            rank_pattern: ranks.map(|(pattern, shape)| (pattern.clone(), shape.rank.into())).collect(),
            alpha_pattern: alphas.map(|(pattern, shape)| (pattern.clone(), shape.alpha.into())).collect(),
            base_model_name_or_path: base,
            revision,
        }
    }
}

/// The groups of expert adapters that PEFT's `target_parameters` hold; none in another `format`.
fn groups_of(adapters: &[LogicalAdapter], format: ExportFormat) -> Vec<experts::Group> {
    if format == ExportFormat::Peft { experts::groups(adapters) } else { Vec::new() }
}

/// Writes both files into `directory`, and checks that the whole adapter is in them.
pub fn write(
    directory: &Path,
    config: &AdapterConfig,
    adapters: &[LogicalAdapter],
    format: ExportFormat,
) -> Result<(), CheckpointError> {
    let mut json = serde_json::json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": false,
        "inference_mode": true, "use_rslora": false, "use_dora": false, "modules_to_save": null,
    });
    if let (Value::Object(all), Ok(Value::Object(own))) = (&mut json, serde_json::to_value(config)) {
        all.extend(own);
    }
    if config.target_parameters.is_empty() {
        json["target_parameters"] = Value::Null;
    }
    let path = directory.join(CONFIG_FILE);
    let text = serde_json::to_string_pretty(&json).unwrap_or_default();
    std::fs::write(&path, text + "\n").map_err(io(&path))?;
    fail_point!("adapter.config_written");

    let path = directory.join(WEIGHTS_FILE);
    let tensors = tensors(adapters, format);
    let mut views: BTreeMap<&str, TensorView> = BTreeMap::new();
    for (key, shape, values) in &tensors {
        let fault = |error: safetensors::SafeTensorError| CheckpointError::Mismatch {
            path: path.clone(),
            reason: format!("{key}: {error}"),
        };
        let view = TensorView::new(Dtype::F32, shape.clone(), bytemuck::cast_slice(values)).map_err(fault)?;
        views.insert(key, view);
    }
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let fault = |error: safetensors::SafeTensorError| CheckpointError::Format {
        path: path.clone(),
        reason: error.to_string(),
    };
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(fault)?;
    std::fs::write(&path, bytes).map_err(io(&path))?;
    fail_point!("adapter.values_written");
    check_written(&path, adapters, format)
}

/// Checks that the file at `path` has the tensors of `adapters` and no others, each parameter as often as they need it.
/// An adapter with a part missing would load, and do nothing there.
fn check_written(
    path: &Path,
    adapters: &[LogicalAdapter],
    format: ExportFormat,
) -> Result<(), CheckpointError> {
    let mismatch = |reason: String| CheckpointError::Mismatch { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(io(path))?;
    // SAFETY: this process has just written the file, and no other writes in the hidden directory. Only the header is
    // read.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io(path))?;
    let file = SafeTensors::deserialize(&map).map_err(|error| mismatch(error.to_string()))?;
    let mut expected: BTreeSet<String> = BTreeSet::new();
    let mut count = 0;
    for adapter in adapters {
        let (parts, experts) = (adapter.leaves.len(), adapter.experts.unwrap_or(1));
        // Each leaf needs an A and its rows of B. A factor that experts share is there once if the format has room for
        // it.
        let copies = |factor| match format {
            ExportFormat::SglangSharedOuter if adapter.shared == Some(factor) => 1,
            _ => experts,
        };
        count += match (adapter.experts, format) {
            (Some(_), ExportFormat::Peft) => 0,
            _ => {
                adapter.shape.rank
                    * (copies(Factor::A) * parts * adapter.input + copies(Factor::B) * adapter.output())
                    + if adapter.shape.use_dora { adapter.output() } else { 0 }
            }
        };
        expected.extend(Layout::from(format).tensors(adapter).into_iter().map(|stored| stored.key));
    }
    for group in groups_of(adapters, format) {
        count += group.shapes().iter().map(|[rows, columns]| rows * columns).sum::<usize>();
        expected.extend(group.keys);
    }
    let found: BTreeSet<String> = file.names().into_iter().map(|name| name.to_owned()).collect();
    if let Some(key) = expected.symmetric_difference(&found).next() {
        let what = if found.contains(key) { "surplus" } else { "missing" };
        return Err(mismatch(format!("{key} is {what} in what was written")));
    }
    let written: usize = file.iter().map(|(_, view)| view.data().len()).sum();
    if written != count * size_of::<f32>() {
        return Err(mismatch(format!("{written} bytes were written of {}", count * size_of::<f32>())));
    }
    Ok(())
}

/// The tensors of the file: key, shape, values. The shape reveals an A or B that is too short.
fn tensors(adapters: &[LogicalAdapter], format: ExportFormat) -> Vec<(String, Vec<usize>, Cow<'_, [f32]>)> {
    let mut tensors = Vec::new();
    for adapter in adapters {
        for stored in Layout::from(format).tensors(adapter) {
            let values = stored.values(adapter);
            tensors.push((stored.key, stored.shape, values));
        }
    }
    for group in groups_of(adapters, format) {
        let values = group.fuse(adapters).map(Cow::from);
        for ((key, shape), values) in group.keys.clone().into_iter().zip(group.shapes()).zip(values) {
            tensors.push((key, shape.to_vec(), values));
        }
    }
    tensors
}

/// A stored adapter on the sites of a model.
pub struct StoredAdapter {
    pub sites: Vec<Site>,
    pub shapes: LoraShapes,
    /// A and B by logical parameter name.
    pub values: HashMap<String, Vec<f32>>,
}

/// The folder of a stored adapter, its files read.
pub struct AdapterFolder {
    config: AdapterConfig,
    file: AdapterFile,
    layout: Layout,
}

impl AdapterFolder {
    /// Reads the adapter in `directory`, in any format.
    ///
    /// # Errors
    /// Files that cannot be read, and a configuration that is not built.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let config = read_config(directory)?;
        let file = AdapterFile::open(directory)?;
        let layout = Layout::of(file.keys());
        Ok(Self { config, file, layout })
    }

    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    fn mismatch(&self, reason: String) -> CheckpointError {
        CheckpointError::Mismatch { path: self.file.path.clone(), reason }
    }

    /// The adapter on a model that has `projections`, with the sites that it adapts.
    ///
    /// # Errors
    /// Those of [`shapes`](Self::shapes) and [`values`](Self::values).
    pub fn adapter(&self, projections: &[Projection]) -> Result<StoredAdapter, CheckpointError> {
        let sites = self.sites(projections);
        let shapes = self.shapes(&sites)?;
        self.warn_of_missing(projections);
        let values = self.values(&sites, &shapes)?;
        Ok(StoredAdapter { sites, shapes, values })
    }

    /// The sites on `projections` that the adapter adapts, by the keys of its file. Keys of experts in PEFT's format
    /// name no targets, so `target_parameters` does. Gate and up of one rank are one adapter on both.
    pub fn sites(&self, projections: &[Projection]) -> Vec<Site> {
        let sites = projections.iter().flat_map(|projection| {
            let leaves = projection.leaf_sites().into_iter().map(|site| (site, true));
            leaves.chain(projection.fused_site().map(|site| (site, false)))
        });
        sites.filter_map(|(site, is_leaf)| self.adapted(site, is_leaf)).collect()
    }

    /// `site`, a leaf or a fused target, as the file has it.
    fn adapted(&self, site: Site, is_leaf: bool) -> Option<Site> {
        if !self.is_parameter(&site) {
            let tensors = self.layout.tensors(&LogicalAdapter::of(&site, self.config.shape()));
            let mut found = tensors.iter().filter_map(|stored| self.file.get(&stored.key)).peekable();
            // A factor that all experts share is stacked with a leading dimension of 1.
            let one = |entry: &Entry| entry.shape.len() == 3 && entry.shape[0] == 1;
            let shares = site.experts.is_some() && (self.layout.shared_once || found.clone().any(one));
            let adapted = is_leaf && found.peek().is_some();
            return adapted.then(|| if shares { site.hybrid() } else { site });
        }
        let independent = self.config.rank_pattern.keys().any(|p| experts::matches(p, &site.parent))
            && self.is_in_blocks(&site);
        let ours = if site.name == "down_proj" { is_leaf } else { is_leaf == independent };
        (ours && self.config.targets_parameter(&experts::parameter_of(&site))).then_some(site)
    }

    /// True if B of the fused gate and up of `site`'s experts has a rank for one of them alone.
    fn is_in_blocks(&self, site: &Site) -> bool {
        let entry = self.file.get(&self.keys(site)[1]);
        let values = entry.and_then(|entry| Some((self.file.floats(entry)?, entry.shape.as_slice())));
        match (values, site.experts) {
            (Some((b, &[rows, columns])), Some(experts)) => {
                experts::is_in_blocks(&b, rows, columns, experts.count)
            }
            // The reader says what is wrong with it.
            _ => true,
        }
    }

    /// Keys of lora_A and lora_B on the parameter of `site`'s experts: gate and up are in the inner wrapper of two.
    fn keys(&self, site: &Site) -> [String; 2] {
        let has_down = self.config.targets_parameter(&format!("{}.down_proj", site.parent));
        experts::keys(&site.parent, has_down && site.name != "down_proj")
    }

    /// True for experts that the file has as fused parameters.
    fn is_parameter(&self, site: &Site) -> bool {
        site.experts.is_some() && self.layout.format == ExportFormat::Peft
    }

    /// Ranks and scales of `sites`, as PEFT would have them.
    ///
    /// # Errors
    /// Tensors in the file that PEFT does not read, because the configuration names other targets, and sites of which
    /// parts have other ranks or scales.
    pub fn shapes(&self, sites: &[Site]) -> Result<LoraShapes, CheckpointError> {
        let mut shapes = LoraShapes::from(self.config.shape());
        let patterns = self.config.patterns().map_err(|error| self.mismatch(error.to_string()))?;
        if let Some(site) = sites.iter().find(|site| shapes.common.use_dora && site.experts.is_some()) {
            let reason =
                format!("{}: magnitudes of DoRA are on linear layers alone, not on experts", site.path());
            return Err(self.mismatch(reason));
        }
        let mut untargeted = Vec::new();
        for site in sites {
            let modules = self.modules(site, &mut untargeted)?;
            let mut all = modules.iter().map(|module| patterns.shape_of(module));
            let Some(shape) = all.next() else { continue };
            if all.any(|other| other != shape) {
                let reason = format!(
                    "the parts of {} differ in rank or alpha; adapt each by its own name",
                    site.path()
                );
                return Err(self.mismatch(reason));
            }
            let own = self.share_of(site, sites, shape)?;
            if own != shapes.common {
                shapes.by_site.insert(site.path(), own);
            }
        }
        if untargeted.is_empty() {
            return Ok(shapes);
        }
        Err(self.mismatch(format!(
            "{} in the file, but no target by target_modules, exclude_modules, layers_to_transform and \
             target_parameters of {CONFIG_FILE}: PEFT would leave that out; mend them, or take the tensors out",
            listed(&untargeted)
        )))
    }

    /// The modules or parameters of `site` by PEFT's names. Those that the file has and the configuration does not
    /// target go to `untargeted`.
    fn modules(&self, site: &Site, untargeted: &mut Vec<String>) -> Result<Vec<String>, CheckpointError> {
        if self.is_parameter(site) {
            let parameter = experts::parameter_of(site);
            let in_file = self.file.get(&self.keys(site)[0]).is_some();
            if in_file && !self.config.targets_parameter(&parameter) {
                untargeted.push(parameter.clone());
            }
            return Ok(vec![parameter]);
        }
        let tensors = self.layout.tensors(&LogicalAdapter::of(site, self.config.shape()));
        let mut modules: Vec<String> = Vec::new();
        for stored in tensors {
            let (path, parameter) = (stored.module().to_owned(), format!("{}.weight", stored.module()));
            let is_parameter = self.config.targets_parameter(&parameter);
            if is_parameter && self.config.targets(&path) {
                let reason =
                    format!("{path} is a target in target_modules and in target_parameters; name it once");
                return Err(self.mismatch(reason));
            }
            let is_known = is_parameter || self.selects(site, &path);
            if !is_known && self.file.get(&stored.key).is_some() && !untargeted.contains(&path) {
                untargeted.push(path.clone());
            }
            modules.push(if is_parameter { parameter } else { path });
        }
        modules.dedup();
        Ok(modules)
    }

    /// True if the configuration selects `site`, whose module in the file is `path`. Experts that are apart or stacked
    /// have other leaf names in some files than in `target_modules`.
    fn selects(&self, site: &Site, path: &str) -> bool {
        let Some(experts) = site.experts else { return self.config.targets(path) };
        let parent = path.rsplit_once('.').map_or(path, |(parent, _)| parent);
        let by_leaf = |leaf: &str| {
            [leaf, experts.names.leaf(leaf)]
                .iter()
                .any(|leaf| self.config.targets(&format!("{parent}.{leaf}")))
        };
        self.config.targets(path)
            || site.leaves.iter().any(|(leaf, _)| by_leaf(leaf))
            || self.config.targets_parameter(&experts::parameter_of(site))
    }

    /// Warns of modules on `projections` that the configuration selects and the file lacks: they stay as the base has
    /// them, as in PEFT, which warns too.
    fn warn_of_missing(&self, projections: &[Projection]) {
        let mut missing = Vec::new();
        // PEFT leaves modules of an MLP out beside experts that are targeted as parameters.
        let left_out =
            |site: &Site| !self.config.target_parameters.is_empty() && site.parent.contains(".mlp");
        let sites = projections.iter().flat_map(Projection::leaf_sites);
        for site in sites.filter(|site| !self.is_parameter(site) && !left_out(site)) {
            let tensors = self.layout.tensors(&LogicalAdapter::of(&site, self.config.shape()));
            if !tensors.iter().any(|stored| self.file.get(&stored.key).is_some()) {
                let module = tensors.iter().map(Stored::module).find(|module| self.selects(&site, module));
                missing.extend(module.map(str::to_owned));
            }
        }
        if !missing.is_empty() {
            tracing::warn!(
                "{}: {} selected by {CONFIG_FILE} but without tensors in the file; what has none stays as the base has it",
                self.file.path.display(),
                listed(&missing)
            );
        }
    }

    /// The shape of `site`, one of `sites`, where its module has `shape`: half the rank for gate or up of experts that
    /// are stored as one.
    fn share_of(&self, site: &Site, sites: &[Site], shape: LoraShape) -> Result<LoraShape, CheckpointError> {
        let halves = ["gate_proj", "up_proj"];
        let is_half = |other: &Site| other.parent == site.parent && halves.contains(&other.name);
        if !self.is_parameter(site)
            || !is_half(site)
            || sites.iter().filter(|&other| is_half(other)).count() < 2
        {
            return Ok(shape);
        }
        if !shape.rank.is_multiple_of(2) {
            let reason = format!("{} has rank {} for gate and up, which is odd", site.parent, shape.rank);
            return Err(self.mismatch(reason));
        }
        let half = shape.of_rank(shape.rank / 2);
        // Two roundings apart is the same scale.
        let common = self.config.shape();
        let is_common = half.rank == common.rank && (half.alpha / common.alpha - 1.0).abs() < 1e-14;
        Ok(if is_common { common } else { half })
    }

    /// A and B by logical parameter name, for the adapters on `sites`; see [`adapters`] for the names. A factor that
    /// experts share has to be the same for all of them, bit for bit.
    ///
    /// # Errors
    /// See [`fill`](Self::fill).
    pub fn values(
        &self,
        sites: &[Site],
        shapes: &LoraShapes,
    ) -> Result<HashMap<String, Vec<f32>>, CheckpointError> {
        let mut adapters: Vec<_> =
            sites.iter().map(|site| LogicalAdapter::of(site, shapes.of(site))).collect();
        self.fill(&mut adapters)?;
        let mut named = HashMap::new();
        for (site, adapter) in sites.iter().zip(adapters) {
            let use_dora = adapter.shape.use_dora;
            let all =
                [(Factor::A, adapter.a), (Factor::B, adapter.b), (Factor::Magnitude, adapter.magnitude)];
            for (factor, values) in
                all.into_iter().filter(|(factor, _)| Factor::all(use_dora).contains(factor))
            {
                let experts = site.experts.map_or(1, |experts| experts.count);
                let mut copies = values.chunks_exact((values.len() / experts).max(1));
                let names = parameters(site, factor);
                named.extend(names.iter().cloned().zip(copies.by_ref().map(<[f32]>::to_vec)));
                if copies.any(|copy| copy != named[&names[0]]) {
                    let reason = format!("{} differs between experts, but this run's share it", names[0]);
                    return Err(self.mismatch(reason));
                }
            }
        }
        Ok(named)
    }

    /// Fills A and B of `adapters`.
    ///
    /// # Errors
    /// A key that is missing, of another shape, or of no adapter; leaves of a fused target whose A's differ in a bit.
    pub fn fill(&self, adapters: &mut [LogicalAdapter]) -> Result<(), CheckpointError> {
        let mut taken = Taken::new(&self.file);
        for group in groups_of(adapters, self.layout.format) {
            let [shape_a, shape_b] = group.shapes();
            let [key_a, key_b] = &group.keys;
            let (a, b) = (taken.take(key_a, &shape_a), taken.take(key_b, &shape_b));
            if let (Some(a), Some(b)) = (a, b)
                && let Some(found) = group.split(&a, &b, adapters)
            {
                taken.faults.push(format!("{key_b} has {found} where no adapter of this run has an element"));
            }
        }
        for adapter in adapters {
            let tensors = self.layout.tensors(adapter);
            if !tensors.is_empty() {
                let (experts, rank) = (adapter.experts.unwrap_or(1), adapter.shape.rank);
                adapter.a = vec![0.0; experts * rank * adapter.input];
                adapter.b = vec![0.0; experts * adapter.output() * rank];
                adapter.magnitude = vec![0.0; if adapter.shape.use_dora { adapter.output() } else { 0 }];
            }
            for stored in tensors {
                let Some(values) = taken.take(&stored.key, &stored.shape) else { continue };
                if stored.repeats && *stored.values(adapter) != *values {
                    let key = &stored.key;
                    taken.faults.push(format!(
                        "{key} differs from its neighbours, but the target is fused and has one A"
                    ));
                }
                stored.fill(&values, adapter);
            }
        }
        let ranks = if self.config.rank_pattern.is_empty() { "" } else { " (rank_pattern gives its ranks)" };
        taken.finish().map_err(|reason| self.mismatch(reason + ranks))
    }
}

/// Tensors that were taken from a file, and what is wrong with it.
struct Taken<'a> {
    file: &'a AdapterFile,
    surplus: BTreeSet<&'a str>,
    missing: Vec<String>,
    faults: Vec<String>,
}

impl<'a> Taken<'a> {
    fn new(file: &'a AdapterFile) -> Self {
        Self { file, surplus: file.keys().collect(), missing: Vec::new(), faults: Vec::new() }
    }

    /// The values of `key`, which has to have `shape`.
    fn take(&mut self, key: &str, shape: &[usize]) -> Option<Vec<f32>> {
        let Some(entry) = self.file.get(key) else {
            self.missing.push(key.to_owned());
            return None;
        };
        self.surplus.remove(key);
        if entry.shape != shape {
            self.faults.push(format!("{key} is {:?}, expected {shape:?}", entry.shape));
            return None;
        }
        let values = self.file.floats(entry);
        if values.is_none() {
            self.faults.push(format!("{key} is {:?}, expected F32, BF16 or F16", entry.dtype));
        }
        values
    }

    fn finish(self) -> Result<(), String> {
        let mut parts = Vec::new();
        if !self.missing.is_empty() {
            parts.push(format!("{} missing", listed(&self.missing)));
        }
        let surplus: Vec<&str> = self.surplus.into_iter().collect();
        if !surplus.is_empty() {
            parts.push(format!("{} surplus", listed(&surplus)));
        }
        // A fault is as long as three names.
        const MOST: usize = 3;
        parts.extend(self.faults.iter().take(MOST).cloned());
        if self.faults.len() > MOST {
            parts.push(format!("{} more of this kind", self.faults.len() - MOST));
        }
        if parts.is_empty() { Ok(()) } else { Err(parts.join("; ")) }
    }
}

/// The first of `names`, and the verb for so many.
fn listed<T: AsRef<str>>(names: &[T]) -> String {
    format!("{} {}", first_of(names), if names.len() == 1 { "is" } else { "are" })
}

/// The adapters on `sites`, with the values that `value` returns for each logical parameter (`….q_proj.lora_A`, or
/// `….experts.3.up_proj.lora_A` for an expert); empty where it returns none. A factor that experts share is repeated
/// for each of them, which is exact.
pub fn adapters(
    sites: &[Site],
    shapes: &LoraShapes,
    mut value: impl FnMut(&str) -> Option<Vec<f32>>,
) -> Vec<LogicalAdapter> {
    let mut all = |site: &Site, factor| -> Vec<f32> {
        let names = parameters(site, factor);
        let copies = site.experts.filter(|_| site.shared == Some(factor)).map_or(1, |experts| experts.count);
        let values: Vec<f32> = names.iter().flat_map(|name| value(name).unwrap_or_default()).collect();
        values.repeat(copies)
    };
    let with_values = |site: &Site| {
        let (a, b) = (all(site, Factor::A), all(site, Factor::B));
        let shape = shapes.of(site);
        let magnitude = if shape.use_dora { all(site, Factor::Magnitude) } else { Vec::new() };
        LogicalAdapter { a, b, magnitude, ..LogicalAdapter::of(site, shape) }
    };
    sites.iter().map(with_values).collect()
}

/// Names of the copies of a site's factor.
fn parameters(site: &Site, factor: Factor) -> Vec<String> {
    (0..site.copies(factor))
        .map(|copy| format!("{}.{}", site.path_of(factor, copy), factor.suffix()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapters() -> Vec<LogicalAdapter> {
        let values = |n: usize, from: f32| (0..n).map(|i| from + i as f32).collect::<Vec<_>>();
        let leaves = |names: &[(&str, usize)]| names.iter().map(|(n, w)| (n.to_string(), *w)).collect();
        vec![
            LogicalAdapter {
                parent: "model.layers.0.self_attn".into(),
                leaves: leaves(&[("q_proj", 4), ("k_proj", 2), ("v_proj", 2)]),
                shape: LoraShape::new(2, 4.0),
                input: 3,
                experts: None,
                names: MoeNames::MLP,
                shared: None,
                a: values(6, 0.5),
                b: values(16, 100.0),
                magnitude: Vec::new(),
            },
            LogicalAdapter {
                parent: "model.layers.0.mlp".into(),
                leaves: leaves(&[("down_proj", 3)]),
                shape: LoraShape::new(2, 4.0),
                input: 5,
                experts: None,
                names: MoeNames::MLP,
                shared: None,
                a: values(10, -3.0),
                b: values(6, 7.0),
                magnitude: Vec::new(),
            },
        ]
    }

    fn config() -> AdapterConfig {
        let target_modules = ["q_proj", "k_proj", "v_proj", "down_proj"].map(str::to_owned).to_vec();
        let base_model_name_or_path = Some("base".into());
        AdapterConfig {
            target_modules: Names::Ends(target_modules),
            base_model_name_or_path,
            ..AdapterConfig::new(LoraShape::new(2, 4.0), None, &[], ExportFormat::Peft)
        }
    }

    fn empty() -> Vec<LogicalAdapter> {
        adapters().into_iter().map(|adapter| LogicalAdapter { a: vec![], b: vec![], ..adapter }).collect()
    }

    fn read(directory: &Path, adapters: &mut [LogicalAdapter]) -> Result<(), CheckpointError> {
        AdapterFolder::open(directory)?.fill(adapters)
    }

    fn floats(view: &TensorView) -> Vec<f32> {
        view.data().as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect()
    }

    #[test]
    fn fused_targets_are_written_split_and_come_back() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), &config(), &adapters(), ExportFormat::Peft).unwrap();
        let bytes = std::fs::read(directory.path().join(WEIGHTS_FILE)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 8);
        let k = file.tensor("base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight").unwrap();
        assert_eq!((k.shape(), floats(&k)), (&[2, 2][..], vec![108.0, 109.0, 110.0, 111.0]));
        let mut back = empty();
        read(directory.path(), &mut back).unwrap();
        assert_eq!(back, adapters());
        assert_eq!(read_config(directory.path()).unwrap(), config());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut other = adapters();
        other[1].leaves[0].0 = "up_proj".into();
        write(directory.path(), &config(), &other, ExportFormat::Peft).unwrap();
        let message = read(directory.path(), &mut empty()).unwrap_err().to_string();
        for part in ["mlp.down_proj.lora_B.weight are missing", "mlp.up_proj.lora_B.weight are surplus"] {
            assert!(message.contains(part), "{part} in {message}");
        }
        // Independent A's cannot start a fused target.
        let split: Vec<LogicalAdapter> = ["q_proj", "k_proj", "v_proj"]
            .iter()
            .zip([4, 2, 2])
            .map(|(leaf, width)| LogicalAdapter {
                leaves: vec![(leaf.to_string(), width)],
                a: vec![width as f32; 6],
                b: vec![0.0; width * 2],
                ..adapters()[0].clone()
            })
            .chain([adapters()[1].clone()])
            .collect();
        write(directory.path(), &config(), &split, ExportFormat::Peft).unwrap();
        let message = read(directory.path(), &mut empty()).unwrap_err().to_string();
        assert!(message.contains("k_proj.lora_A.weight differs"), "{message}");
    }

    #[test]
    fn configs_that_mean_other_maths_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        for (field, value) in [
            ("use_qalora", Value::from(true)),
            ("bias", "all".into()),
            ("modules_to_save", serde_json::json!(["lm_head"])),
            ("peft_type", "IA3".into()),
        ] {
            write(directory.path(), &config(), &[], ExportFormat::Peft).unwrap();
            let path = directory.path().join(CONFIG_FILE);
            let mut json: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            json[field] = value;
            std::fs::write(&path, json.to_string()).unwrap();
            let error = read_config(directory.path()).unwrap_err();
            assert!(
                matches!(error, CheckpointError::NotBuilt { field: ref named, .. } if named == field),
                "{error}"
            );
        }
    }
}
