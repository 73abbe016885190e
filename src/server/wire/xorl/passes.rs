//! Passes and updates: `forward_backward`, `forward`, `optim_step`, `abort_gradient_epoch`.

use super::{
    Call,
    data::{Bounds, Row, WireDatum, of_row},
    fields::{Fields, model_id},
};
use crate::{
    console::first_of,
    loss::{NamedLoss, Param},
    server::{
        app::mismatched,
        fault::Fault,
        futures::Body,
        request::{Datum, OptimStep, Pass, PassReply, Reply, StepReply, Task},
        wire::scalar::Scalar,
    },
};
use serde::{Deserialize, Serialize, de::IgnoredAny};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The loss of a request that names none.
const DEFAULT_LOSS: &str = "causallm_loss";

type Params = BTreeMap<String, Scalar>;

/// The body of a pass: the client's, or that of the LoRA page with rows in `batches`.
#[derive(Deserialize)]
struct PassBody {
    model_id: Option<String>,
    session_id: Option<String>,
    seq_id: Option<i64>,
    forward_backward_input: Option<PassInput>,
    forward_input: Option<PassInput>,
    batches: Option<Vec<Row>>,
    loss_fn: Option<String>,
    loss_fn_params: Option<Params>,
    loss_fn_config: Option<Params>,
}

#[derive(Deserialize)]
struct PassInput {
    #[serde(default)]
    data: Vec<WireDatum>,
    loss_fn: Option<String>,
    loss_fn_params: Option<Params>,
    loss_fn_config: Option<Params>,
    routed_experts: Option<IgnoredAny>,
}

/// The loss that a request names, with the parameters that are there.
fn named_loss(name: Option<String>, params: Option<Params>) -> Result<NamedLoss, Fault> {
    let param = |(name, value)| {
        let param = match value {
            Scalar::Null => return None,
            Scalar::Flag(flag) => Ok(Param::Number(f64::from(u8::from(flag)))),
            Scalar::Number(number) => Ok(Param::Number(number)),
            Scalar::Text(text) => Ok(Param::Text(text)),
            Scalar::Parts => {
                Err(Fault::user(format!("loss_fn_params.{name}: expected a number or a text, got neither")))
            }
        };
        Some(param.map(|param| (name, param)))
    };
    let params = params.unwrap_or_default().into_iter().filter_map(param).collect::<Result<_, _>>()?;
    Ok(NamedLoss { name: name.unwrap_or_else(|| DEFAULT_LOSS.into()), params })
}

/// Submits a pass; `forward` has no backward.
pub fn pass(call: &Call) -> Result<Value, Fault> {
    let body: PassBody =
        serde_json::from_slice(call.body).map_err(|error| Fault::user(format!("body: {error}")))?;
    let backward = call.name == "forward_backward";
    let model = model_id(body.model_id.as_deref().or(body.session_id.as_deref()))?;
    let settings = &call.app.settings;
    let bounds = Bounds { vocab_size: settings.vocab_size, max_tokens: settings.max_tokens };
    let (data, loss) = match (body.forward_backward_input.or(body.forward_input), body.batches) {
        (Some(_), Some(_)) => {
            return Err(Fault::user("body: expected batches or forward_backward_input, got both"));
        }
        (None, None) => {
            return Err(Fault::user(
                "body: expected forward_backward_input with data, or batches with rows of input_ids and labels",
            ));
        }
        (Some(input), None) => {
            if input.routed_experts.is_some() {
                return Err(Fault::user(
                    "routed_experts: the routing of a rollout is not replayed; leave it out",
                ));
            }
            let data = input.data.iter().enumerate();
            let data = data
                .map(|(i, datum)| datum.datum(&format!("data[{i}]"), bounds))
                .collect::<Result<_, _>>()?;
            (data, named_loss(input.loss_fn, input.loss_fn_params.or(input.loss_fn_config))?)
        }
        (None, Some(rows)) => {
            let rows = rows.iter().enumerate();
            let data = rows.map(|(i, row)| of_row(row, &format!("batches[{i}]"), bounds));
            let loss = named_loss(body.loss_fn, body.loss_fn_params.or(body.loss_fn_config))?;
            (data.collect::<Result<Vec<_>, _>>()?.concat(), loss)
        }
    };
    bounds.check_size(&data)?;
    let shapes = Shapes::of(&data, &loss);
    let task = Task::Pass(Pass { data, loss, backward });
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Passed(pass) => shapes.body(pass),
        other => mismatched(other),
    });
    call.submit(&model, body.seq_id, task, render)
}

/// The parts of a request that its reply needs.
struct Shapes {
    /// k of each datum.
    ks: Vec<usize>,
    /// The weights of each datum; `None`: 1. `None` in place of all where the loss is no weighted sum of log p.
    weights: Option<Vec<Option<Vec<f32>>>>,
}

#[derive(Serialize)]
struct TensorData<'a> {
    data: std::borrow::Cow<'a, [f32]>,
    dtype: &'static str,
    shape: Vec<usize>,
}

#[derive(Serialize)]
struct LossOutput<'a> {
    logprobs: TensorData<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    elementwise_loss: Option<TensorData<'a>>,
}

#[derive(Serialize)]
struct PassResult<'a> {
    loss_fn_output_type: &'static str,
    loss_fn_outputs: Vec<LossOutput<'a>>,
    metrics: BTreeMap<&'a str, f64>,
    info: Value,
}

impl Shapes {
    fn of(data: &[Datum], loss: &NamedLoss) -> Self {
        let is_sum = ["cross_entropy", "causallm_loss"].contains(&loss.name.as_str());
        let weights = || data.iter().map(|datum| datum.inputs.get("weights").cloned()).collect();
        Self { ks: data.iter().map(|datum| datum.k).collect(), weights: is_sum.then(weights) }
    }

    /// −w·log p of each target of datum `i`, for a loss that is their sum.
    fn losses(&self, i: usize, k: usize, log_probs: &[f32]) -> Option<Vec<f32>> {
        let weights = self.weights.as_ref()?.get(i)?;
        let weight = |at: usize| match weights {
            None => 1.0,
            Some(weights) if weights.len() == log_probs.len() => weights[at],
            Some(weights) => weights.get(at / k).copied().unwrap_or(1.0),
        };
        Some(log_probs.iter().enumerate().map(|(at, log_prob)| -weight(at) * log_prob).collect())
    }

    fn body(&self, pass: &PassReply) -> Body {
        let mut outputs = Vec::with_capacity(pass.log_probs.len());
        for (i, log_probs) in pass.log_probs.iter().enumerate() {
            let k = self.ks.get(i).copied().unwrap_or(1).max(1);
            let shape = if k == 1 { vec![log_probs.len()] } else { vec![log_probs.len() / k, k] };
            let losses = self.losses(i, k, log_probs);
            outputs.push(LossOutput {
                logprobs: TensorData { data: log_probs.into(), dtype: "float32", shape: shape.clone() },
                elementwise_loss: losses.map(|data| TensorData {
                    data: data.into(),
                    dtype: "float32",
                    shape,
                }),
            });
        }
        let mut metrics: BTreeMap<&str, f64> =
            pass.metrics.iter().map(|(name, &value)| (name.as_str(), value)).collect();
        metrics.insert("loss:sum", pass.loss);
        metrics.insert("loss:mean", pass.loss / (pass.valid.max(1) as f64));
        metrics.insert("valid_tokens:sum", pass.valid as f64);
        Body::json(&PassResult {
            loss_fn_output_type: "ArrayRecord",
            loss_fn_outputs: outputs,
            metrics,
            info: json!({}),
        })
    }
}

/// Submits an update. Values outside `adam_params` come first, then those in it, then the server's.
pub fn optim_step(call: &Call, fields: &Fields) -> Result<Value, Fault> {
    let adam = fields.object("adam_params", "adam_params.")?;
    let known = &call.app.settings.optim;
    let positive = |number: f64| number >= 0.0;
    let below_one = |number: f64| (0.0..1.0).contains(&number);
    let of = |fields: &Fields, names: &[&str]| fields.number(names, "a number of at least 0", positive);
    let beta = |name, known| {
        Ok::<_, Fault>(adam.number(&[name], "a number from 0 to below 1", below_one)?.unwrap_or(known))
    };
    let first = |own: Option<f64>, given: Option<f64>, known| own.or(given).unwrap_or(known);
    let step = OptimStep {
        lr: first(of(fields, &["learning_rate", "lr"])?, of(&adam, &["learning_rate", "lr"])?, known.lr),
        betas: (beta("beta1", known.betas.0)?, beta("beta2", known.betas.1)?),
        eps: of(&adam, &["eps"])?.unwrap_or(known.eps),
        weight_decay: of(&adam, &["weight_decay"])?.unwrap_or(known.weight_decay),
        max_grad_norm: first(
            fields.number(&["gradient_clip"], "a number", |_| true)?,
            adam.number(&["grad_clip_norm"], "a number", |_| true)?,
            known.max_grad_norm,
        ),
        divide: true,
    };
    let lr = step.lr;
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Stepped(stepped) => step_body(stepped, lr),
        other => mismatched(other),
    });
    call.submit(&fields.model()?, fields.seq_id()?, Task::OptimStep(step), render)
}

fn step_body(stepped: &StepReply, lr: f64) -> Body {
    let StepReply { step, grad_norm, non_finite } = stepped;
    let mut metrics = BTreeMap::from([("learning_rate", lr), ("step", *step as f64)]);
    // JSON has no infinity: a norm that is not finite is left out.
    metrics.extend(grad_norm.is_finite().then_some(("grad_norm", *grad_norm)));
    metrics.insert("skipped", f64::from(u8::from(!non_finite.is_empty())));
    let cause = match grad_norm.is_finite() {
        true => "this learning_rate and gradient would make values that are not finite of",
        false => "those are not finite of",
    };
    let info = match non_finite.is_empty() {
        true => json!({}),
        false => json!({"warning": format!(
            "nothing was updated, and the gradients are dropped: {cause} {}", first_of(non_finite)
        )}),
    };
    Body::json(&json!({"metrics": metrics, "info": info}))
}

/// Drops the gradients since the last update.
pub fn abort(call: &Call, fields: &Fields) -> Result<Value, Fault> {
    let model = fields.model()?;
    let name = model.clone();
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Aborted { step } => Body::json(&json!({
            "success": true, "model_id": name, "step": step, "forward_backward_step": 0, "info": {},
        })),
        other => mismatched(other),
    });
    call.submit(&model, fields.seq_id()?, Task::AbortGradients, render)
}
