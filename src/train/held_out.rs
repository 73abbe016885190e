//! The command `eval`, whole: loss, perplexity and exact match of held-out rows, of a base with and without an adapter.

use super::{Evaluation, Run, output::run_dir};
use crate::{
    checkpoint::{
        peft::{AdapterFolder, StoredAdapter},
        state::TrainedBase,
        steps,
    },
    comm::World,
    config::{self, Loaded, Override},
    console::count,
    data::{IGNORE_INDEX, Row, Tokenizer},
    dtype::DType,
    error::{Error, Result},
    infer::{
        local::Local,
        request::{Choice, End, SampleRequest, Stop, Wanted},
        run::quantization_of,
    },
    lora::Adapter,
    model::{
        base_plan::all_projections, hf_config::HfModel, quantized::Quantization, transformer::Transformer,
    },
    shard::ProcessGroups,
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tch::Device;

/// Tokens that an answer may have beyond those of its reference: the same text in other tokens.
const MORE_TOKENS: usize = 16;

/// Fields that flags of the command set, and their names there.
const FLAGS: [(&str, &str); 4] = [
    ("data.test_datasets[0].path", "data"),
    ("data.test_datasets[0].type", "type"),
    ("data.test_datasets[0].columns", "columns"),
    ("model.model_path", "model"),
];

/// A request to evaluate.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EvalRequest {
    /// The run whose model and rows are taken; `None`: `model` or the base of `adapter`, on `data`.
    pub config: Option<PathBuf>,
    /// Fields of the run that are set.
    pub overrides: Vec<Override>,
    /// HF model directory; `None`: that of the run, or the base that the adapter names.
    pub model: Option<PathBuf>,
    /// A PEFT adapter, or what [`steps::adapter_at`] reads; `None`: the newest step of the run, if it has one.
    pub adapter: Option<PathBuf>,
    /// Rows in place of those that validate in the run.
    pub data: Option<PathBuf>,
    /// Type of `data`, as in the field `data.datasets`; `None`: told by its first row.
    pub kind: Option<String>,
    /// Names in `data` of the fields that its type reads.
    pub columns: BTreeMap<String, String>,
    /// Compute dtype without a run; `None`: that of the checkpoint, fp32 for fp16.
    pub compute: Option<DType>,
    /// Greedy answers are compared with the last one of each sample.
    pub exact_match: bool,
}

/// The last answer of a sample, and all that is before it.
#[derive(Clone, Debug, PartialEq)]
struct Answer {
    prompt: Vec<i64>,
    reference: Vec<i64>,
}

/// Answers of a model that were equal to their references.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExactMatch {
    pub matched: usize,
    pub of: usize,
}

/// Scores of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    pub evaluation: Evaluation,
    pub exact_match: Option<ExactMatch>,
}

/// Scores of a base, and of the same with an adapter.
pub struct Outcome {
    model: String,
    adapter: Option<String>,
    rows: usize,
    base: Scores,
    adapted: Option<Scores>,
}

/// An evaluation, read and validated.
pub struct HeldOut {
    run: Run,
    adapter: Option<(PathBuf, StoredAdapter)>,
    tokenizer: Option<Arc<Tokenizer>>,
    answers: Vec<Answer>,
    end_token_ids: Vec<i64>,
}

impl HeldOut {
    /// Reads everything but the weights, for one of `world` ranks. Enters no collective and writes nothing.
    ///
    /// # Errors
    /// A path, field or row that is wrong, or nothing to evaluate on.
    pub fn prepare(request: &EvalRequest, world: usize) -> Result<Self> {
        let mut loaded = request.load()?;
        let model = &mut loaded.config.model;
        let adapter = match (&request.adapter, &request.config) {
            (Some(path), _) => Some(steps::adapter_at(path).map_err(Error::Input)?),
            (None, None) => None,
            (None, Some(_)) => {
                let run = run_dir(&loaded.config.train);
                let has_steps = !steps::published(&run).is_empty();
                has_steps.then(|| steps::adapter_at(&run)).transpose().map_err(Error::Input)?
            }
        };
        let trained = adapter.as_deref().map(TrainedBase::of).transpose()?.flatten();
        if let (Some(adapter), Some(trained), None) = (&adapter, &trained, &request.model)
            && trained.merges > 0
        {
            // The step has the one base that its adapter belongs to.
            model.model_path = Some(steps::base_of(adapter).map_err(Error::Input)?);
        }
        let (place, of_loss) =
            (loaded.places.of("data").to_string(), loaded.places.of("train.loss_fn").to_string());
        let mut run = Run::from_config(loaded, world)?;
        if run.loss.is_of_pairs() {
            return Err(Error::Input(format!(
                "{of_loss}: eval gives losses of tokens, not of pairs; data.val_set_size evaluates pairs during training"
            )));
        }
        if run.dataset.validation_rows() == 0 {
            return Err(Error::Input(format!(
                "{place}: nothing to evaluate on: set data.test_datasets or data.val_set_size, or give --data FILE"
            )));
        }
        let directory = run.files.weights.clone();
        if let (Some(adapter), Some(trained), Some(directory), None) =
            (&adapter, &trained, &directory, &request.config)
        {
            let source = run.source.as_ref();
            run.spec.quantization = quantization_of(trained, adapter, directory, source)?;
        }
        let projections = all_projections(&run.spec);
        let read = |path: PathBuf| {
            // Faults of an adapter that the user named are the user's to mend.
            let stored = AdapterFolder::open(&path).and_then(|folder| folder.adapter(&projections));
            stored.map(|stored| (path, stored)).map_err(|error| Error::Input(error.to_string()))
        };
        let adapter = adapter.map(read).transpose()?;
        let (mut tokenizer, mut answers, mut end_token_ids) = (None, Vec::new(), Vec::new());
        if request.exact_match {
            tokenizer = Some(Arc::new(Tokenizer::load(&run.files.tokenizer)?));
            end_token_ids = HfModel::open(&run.files.config)?.end_token_ids;
            for index in 0..run.dataset.validation_rows() {
                answers.extend(answers_of(&run.dataset.validation_row(index)?, &end_token_ids));
            }
            if answers.is_empty() {
                let reason = "no sample ends with an answer behind a prompt; give chats";
                return Err(Error::Input(format!("--exact-match: {reason}")));
            }
        }
        Ok(Self { run, adapter, tokenizer, answers, end_token_ids })
    }

    /// The run that the rows and the model are of.
    pub fn run(&self) -> &Run {
        &self.run
    }

    /// Computes all scores, the same on every rank. Collective.
    ///
    /// # Errors
    /// The device computes no packed base, a collective fails, or outputs are not finite.
    pub fn execute(mut self, world: &World) -> Result<Outcome> {
        let (run, watcher) = (&self.run, world.watcher());
        watcher.set_timeout(Duration::from_secs(run.config.train.comm_timeout_s as u64));
        let groups = ProcessGroups::new(world, run.mesh);
        let device = groups.device.tensors();
        if let Some(reason) = run.spec.quantization.as_ref().and_then(|_| Quantization::refusal(device)) {
            return Err(Error::Input(format!("the base is quantised: {reason}")));
        }
        let mut model = Transformer::new(run.spec.clone(), run.options(), &groups)?;
        model.load(run.source.as_ref())?;
        groups.open(run.spec.moe().is_some())?;
        let base = self.scores(&mut model, None, &groups)?;
        let mut adapted = None;
        if let Some((_, stored)) = &mut self.adapter {
            let mut own = model.new_adapter(&stored.sites, stored.shapes.clone());
            let values = std::mem::take(&mut stored.values);
            own.set(|parameter, range| values[&parameter.name][range].to_vec())?;
            drop(values);
            adapted = Some(self.scores(&mut model, Some(&mut own), &groups)?);
        }
        let named = |path: &Path| path.display().to_string();
        let model = self.run.config.model.model_path.as_deref();
        Ok(Outcome {
            model: model.map_or_else(|| "random weights".to_owned(), named),
            adapter: self.adapter.as_ref().map(|(path, _)| named(path)),
            rows: self.run.dataset.validation_rows(),
            base,
            adapted,
        })
    }

    fn scores(
        &self,
        model: &mut Transformer,
        mut adapter: Option<&mut Adapter>,
        groups: &ProcessGroups,
    ) -> Result<Scores> {
        let adapters = &mut adapter.iter_mut().map(|adapter| &mut **adapter).collect::<Vec<_>>()[..];
        let evaluation = self.run.evaluate(model, adapters, &*groups.world, None, None)?;
        let left = || Error::Failure("an evaluation was left that nobody may stop (a bug)".into());
        let evaluation = evaluation.ok_or_else(left)?;
        let Some(tokenizer) = &self.tokenizer else { return Ok(Scores { evaluation, exact_match: None }) };
        // Answers are those of generate, and losses those without them, also in bf16.
        model.set_deterministic_sampling(model.device().tensors() == Device::Cpu);
        let requests: Vec<SampleRequest> = self.answers.iter().map(|answer| self.request(answer)).collect();
        let decode = tokenizer.clone();
        let mut local = Local { model: &mut *model, adapter, world: groups.shard.as_ref(), decode };
        let replies = local.sample(&requests, |_, _| ())?;
        let mut matched = 0;
        for (answer, reply) in self.answers.iter().zip(replies) {
            for given in reply.continuations {
                let ended = usize::from(given.end == End::Id);
                let ids = &given.ids[..given.ids.len().saturating_sub(ended)];
                let text = |ids: &[i64]| Ok::<_, Error>(tokenizer.decode(ids, true)?.trim().to_owned());
                matched += usize::from(text(ids)? == text(&answer.reference)?);
            }
        }
        model.set_deterministic_sampling(false);
        Ok(Scores { evaluation, exact_match: Some(ExactMatch { matched, of: self.answers.len() }) })
    }

    /// The request for a greedy answer.
    fn request(&self, answer: &Answer) -> SampleRequest {
        SampleRequest {
            prompt: answer.prompt.clone(),
            count: 1,
            max_new_tokens: answer.reference.len() + MORE_TOKENS,
            choice: Choice { temperature: 0.0, top_p: 1.0, top_k: None },
            seed: 0,
            stop: Stop { ids: self.end_token_ids.clone(), texts: Vec::new() },
            wanted: Wanted::default(),
        }
    }
}

impl EvalRequest {
    /// The configuration of the run, or one that is made of the model and the data.
    fn load(&self) -> Result<Loaded> {
        let mut overrides = self.overrides.clone();
        let mut set = |field: &str, value: Value| {
            let values = vec![value.as_str().map_or_else(|| value.to_string(), str::to_owned)];
            overrides.push(Override { field: field.into(), values });
        };
        if let Some(data) = &self.data {
            let kind = self.kind.as_deref().unwrap_or("auto");
            set("data.test_datasets", json!([{"path": data, "type": kind, "columns": self.columns}]));
            set("data.val_set_size", json!("null"));
        }
        if let Some(config) = &self.config {
            if let Some(model) = &self.model {
                set("model.model_path", json!(model));
            }
            return Ok(config::load_with_paths(config, &overrides).map_err(|error| error.with_flags(&FLAGS))?);
        }
        let model = match (&self.model, &self.adapter) {
            (Some(model), _) => model.clone(),
            (None, Some(adapter)) => {
                let step = steps::adapter_folder(adapter).map_err(Error::Input)?;
                steps::base_of(&step).map_err(Error::Input)?
            }
            (None, None) => {
                return Err(Error::Input("--model is missing, and no --adapter names one".into()));
            }
        };
        let stored = HfModel::open(&model)?.dtype.unwrap_or(DType::F32);
        let compute = self.compute.unwrap_or(if stored == DType::F16 { DType::F32 } else { stored });
        set("model.model_path", json!(model));
        // The rows to train on are never read.
        let made = json!({
            "data": {"datasets": [{"path": "dummy", "num_samples": 1}], "sample_packing_method": "none"},
            "train": {"enable_mixed_precision": compute == DType::Bf16},
        });
        let loaded = config::load_yaml_with_paths(Path::new("eval"), &made.to_string(), &overrides);
        Ok(loaded.map_err(|error| error.with_flags(&FLAGS))?)
    }
}

/// The last answer of each document of `row`: its last run of labels, up to a token of `ends`.
fn answers_of(row: &Row, ends: &[i64]) -> Vec<Answer> {
    let mut first = 0;
    let answer = |&length: &usize| {
        let own = first..first + length;
        first = own.end;
        let (ids, labels) = (&row.input_ids[own.clone()], &row.labels[own]);
        let last = labels.iter().rposition(|&label| label != IGNORE_INDEX)?;
        let begin = labels[..last].iter().rposition(|&label| label == IGNORE_INDEX)? + 1;
        let reference = &ids[begin..=last];
        let end = reference.iter().position(|id| ends.contains(id)).unwrap_or(reference.len());
        Some(Answer { prompt: ids[..begin].to_vec(), reference: reference[..end].to_vec() })
    };
    row.document_lengths.iter().filter_map(answer).collect()
}

impl Outcome {
    fn scores(&self) -> impl Iterator<Item = (&'static str, &Scores)> {
        [("base", &self.base)].into_iter().chain(self.adapted.iter().map(|scores| ("adapter", scores)))
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let on = self.adapter.as_ref().map_or_else(String::new, |adapter| format!("{adapter} on "));
        let tokens = count(self.base.evaluation.tokens as usize, "token");
        let mut text = format!("{on}{}: {}, {tokens} with loss\n", self.model, count(self.rows, "row"));
        let matches = self.base.exact_match.is_some();
        let _ = writeln!(
            text,
            "{:<10}{:>10}{:>14}{}",
            "",
            "loss",
            "perplexity",
            if matches { "   exact match" } else { "" }
        );
        for (name, Scores { evaluation, exact_match }) in self.scores() {
            let exact = exact_match.map_or_else(String::new, |ExactMatch { matched, of }| {
                format!("{:>14}", format!("{matched} of {of}"))
            });
            let perplexity = evaluation.perplexity();
            let _ = writeln!(text, "{name:<10}{:>10.4}{perplexity:>14.3}{exact}", evaluation.loss);
        }
        text
    }

    /// The same in one line of JSON: `model`, `adapter`, `rows`, and for `base` and `with_adapter` (null without one)
    /// `loss`, `perplexity`, `tokens` and `exact_match` (`matched`, `of`; null where it was not asked for).
    pub fn json(&self) -> String {
        let told = |scores: &Scores| {
            let exact = scores.exact_match.map(|exact| json!({"matched": exact.matched, "of": exact.of}));
            json!({"loss": scores.evaluation.loss, "perplexity": scores.evaluation.perplexity(),
                "tokens": scores.evaluation.tokens, "exact_match": exact})
        };
        let all = json!({"model": self.model, "adapter": self.adapter, "rows": self.rows, "base": told(&self.base),
            "with_adapter": self.adapted.as_ref().map(told)});
        format!("{all}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_the_last_run_of_labels_up_to_its_end() {
        let row = Row {
            input_ids: vec![1, 2, 3, 4, 5, 9, 6, 1, 7, 8, 0],
            labels: vec![-100, 2, -100, 4, 5, 9, 6, 1, 7, -100, -100],
            document_lengths: vec![7, 3, 1],
            ..Row::default()
        };
        let expected = Answer { prompt: vec![1, 2, 3], reference: vec![4, 5] };
        assert_eq!(answers_of(&row, &[9]), [expected], "a document that is trained whole has no prompt");
    }

    #[test]
    fn a_table_and_json_say_the_same() {
        let scores = |loss, matched| Scores {
            evaluation: Evaluation { loss, tokens: 30, rewards: None, seconds: 1.0 },
            exact_match: Some(ExactMatch { matched, of: 4 }),
        };
        let outcome = Outcome {
            model: "m".into(),
            adapter: Some("a".into()),
            rows: 4,
            base: scores(2.0, 0),
            adapted: Some(scores(0.5, 3)),
        };
        let expected = "a on m: 4 rows, 30 tokens with loss\n\
            \x20               loss    perplexity   exact match\n\
            base          2.0000         7.389        0 of 4\n\
            adapter       0.5000         1.649        3 of 4\n";
        assert_eq!(outcome.table(), expected);
        let json: Value = serde_json::from_str(&outcome.json()).unwrap();
        assert_eq!((&json["base"]["tokens"], &json["with_adapter"]["loss"]), (&json!(30), &json!(0.5)));
        assert_eq!(json["with_adapter"]["exact_match"], json!({"matched": 3, "of": 4}));
    }
}
