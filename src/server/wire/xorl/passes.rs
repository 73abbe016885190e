//! Passes and updates: `forward_backward`, `forward`, `optim_step`, `abort_gradient_epoch`.

use super::{
    Call,
    answers::{AbortResult, LossOutput, PassResult, StepResult, TensorData},
    bodies::{self, AdamParams},
    cell::Cell,
    data::{Bounds, Row, WireDatum, of_row},
    fields::model_id,
};
use crate::{
    console::first_of,
    loss::{NamedLoss, Param},
    server::{
        app::mismatched,
        fault::Fault,
        futures::Body,
        request::{Datum, OptimStep, Pass, PassReply, Reply, StepReply, Task},
        wire::{
            bounded::{Fields, List},
            scalar::Scalar,
        },
    },
};
use serde::{Deserialize, de::IgnoredAny};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// The loss of a request that names none.
const DEFAULT_LOSS: &str = "causallm_loss";

type Params = Fields<Scalar>;

/// The body of a pass: the client's, or that of the LoRA page with rows in `batches`.
///
/// Fields as in the bodies of other calls, but read at once: it may be large.
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::Pass)]
pub struct PassBody {
    /// Name of the adapter; `default` where it is absent.
    #[schema(example = "default", pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    model_id: Option<String>,
    /// Another name of `model_id`, read where that is absent.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
    session_id: Option<String>,
    /// A number that no other request since `create_model` has. The same body again gets the first one's future.
    seq_id: Option<i64>,
    forward_backward_input: Option<PassInput>,
    /// Another name of `forward_backward_input`, read where that is absent.
    forward_input: Option<PassInput>,
    /// Rows as those of a training file: `input_ids`, `labels`, and inputs of the loss. Not beside data.
    #[schema(
        value_type = Option<Vec<BTreeMap<String, Cell>>>,
        example = json!([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}])
    )]
    batches: Option<List<Row>>,
    /// The loss of `batches`; `causallm_loss` where it is absent.
    #[schema(example = "causallm_loss")]
    loss_fn: Option<String>,
    #[schema(value_type = Option<BTreeMap<String, Scalar>>)]
    loss_fn_params: Option<Params>,
    /// Another name of `loss_fn_params`, read where that is absent.
    #[schema(value_type = Option<BTreeMap<String, Scalar>>)]
    loss_fn_config: Option<Params>,
}

/// Data with their loss.
#[derive(Deserialize, ToSchema)]
#[schema(as = xorl::PassInput)]
struct PassInput {
    /// At least one.
    #[serde(default)]
    #[schema(value_type = Vec<WireDatum>, required = true, min_items = 1)]
    data: List<WireDatum>,
    #[schema(example = "cross_entropy")]
    loss_fn: Option<String>,
    #[schema(value_type = Option<BTreeMap<String, Scalar>>)]
    loss_fn_params: Option<Params>,
    /// Another name of `loss_fn_params`, read where that is absent.
    #[schema(value_type = Option<BTreeMap<String, Scalar>>)]
    loss_fn_config: Option<Params>,
    #[schema(ignore)]
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
    let params = params.unwrap_or_default().0.into_iter().filter_map(param).collect::<Result<_, _>>()?;
    Ok(NamedLoss { name: name.unwrap_or_else(|| DEFAULT_LOSS.into()), params })
}

/// Reads the body of a pass, apart from other bodies: it is too large for a track of the field that is being read.
pub(super) fn read(body: &[u8]) -> Result<PassBody, Fault> {
    serde_json::from_slice(body).map_err(|error| Fault::user(format!("body: {error}")))
}

/// The data of a pass and their loss.
///
/// # Errors
/// They are out of `bounds`, or make no sense.
pub(super) fn data(body: PassBody, bounds: Bounds) -> Result<(Vec<Datum>, NamedLoss), Fault> {
    match (body.forward_backward_input.or(body.forward_input), body.batches) {
        (Some(_), Some(_)) => Err(Fault::user("body: expected batches or forward_backward_input, got both")),
        (None, None) => Err(Fault::user(
            "body: expected forward_backward_input or forward_input with data, or batches with rows of input_ids and labels",
        )),
        (Some(input), None) => {
            if input.routed_experts.is_some() {
                return Err(Fault::user(
                    "routed_experts: the routing of a rollout is not replayed; leave it out",
                ));
            }
            let data = input.data.iter().enumerate();
            let data = data.map(|(i, datum)| Ok(vec![datum.datum(&format!("data[{i}]"), bounds)?]));
            let loss = named_loss(input.loss_fn, input.loss_fn_params.or(input.loss_fn_config));
            Ok((bounds.gather(data)?, loss?))
        }
        (None, Some(rows)) => {
            let rows = rows.iter().enumerate();
            let data = rows.map(|(i, row)| of_row(row, &format!("batches[{i}]"), bounds));
            let loss = named_loss(body.loss_fn, body.loss_fn_params.or(body.loss_fn_config));
            Ok((bounds.gather(data)?, loss?))
        }
    }
}

/// Submits a pass; `forward` has no backward.
pub fn pass(call: &Call) -> Result<Value, Fault> {
    let body = read(call.body)?;
    let backward = call.name == "forward_backward";
    let model = model_id(body.model_id.as_deref().or(body.session_id.as_deref()))?;
    let (seq_id, settings) = (body.seq_id, &call.app.settings);
    let bounds = Bounds { vocab_size: settings.vocab_size, max_tokens: settings.max_tokens };
    let (data, loss) = data(body, bounds)?;
    let shapes = Shapes::of(&data, &loss);
    let task = Task::Pass(Pass { data, loss, backward });
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Passed(pass) => shapes.body(pass),
        other => mismatched(other),
    });
    call.submit(&model, seq_id, task, render)
}

/// The parts of a request that its reply needs.
struct Shapes {
    /// k of each datum.
    ks: Vec<usize>,
    /// The weights of each datum; `None`: 1. `None` in place of all where the loss is no weighted sum of log p.
    weights: Option<Vec<Option<Vec<f32>>>>,
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
                logprobs: TensorData::floats(log_probs, shape.clone()),
                elementwise_loss: losses.map(|losses| TensorData::floats(losses, shape)),
            });
        }
        Body::json(&PassResult {
            loss_fn_output_type: "ArrayRecord",
            loss_fn_outputs: outputs,
            metrics: PassResult::metrics(pass),
            info: Map::new(),
        })
    }
}

/// Submits an update. Values outside `adam_params` come first, then those in it, then the server's.
pub fn optim_step(call: &Call) -> Result<Value, Fault> {
    let (model, seq_id, body) = call.read::<bodies::OptimStep>()?;
    let AdamParams { learning_rate, lr, beta1, beta2, eps, weight_decay, grad_clip_norm } =
        body.adam_params.unwrap_or_default();
    let known = &call.app.settings.optim;
    let step = OptimStep {
        lr: body.learning_rate.or(body.lr).or(learning_rate).or(lr).unwrap_or(known.lr),
        betas: (beta1.unwrap_or(known.betas.0), beta2.unwrap_or(known.betas.1)),
        eps: eps.unwrap_or(known.eps),
        weight_decay: weight_decay.unwrap_or(known.weight_decay),
        max_grad_norm: body.gradient_clip.or(grad_clip_norm).unwrap_or(known.max_grad_norm),
        divide: true,
    };
    step.check().map_err(|error| Fault::user(error.to_string()))?;
    let lr = step.lr;
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Stepped(stepped) => step_body(stepped, lr),
        other => mismatched(other),
    });
    call.submit(&model, seq_id, Task::OptimStep(step), render)
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
    Body::json(&StepResult { metrics, info })
}

/// Drops the gradients since the last update.
pub fn abort(call: &Call) -> Result<Value, Fault> {
    let (model, seq_id) = call.address()?;
    let name = model.clone();
    let render = Box::new(move |reply: &Reply, _| match reply {
        Reply::Aborted { step } => Body::json(&AbortResult {
            success: true,
            model_id: &name,
            step: *step,
            forward_backward_step: 0,
            info: Map::new(),
        }),
        other => mismatched(other),
    });
    call.submit(&model, seq_id, Task::AbortGradients, render)
}
