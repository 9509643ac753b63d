"""Results of steps -> numbers on the screen, in metrics.jsonl and, by option, in TensorBoard.

A line of metrics.jsonl is a JSON object. One of a training step has

| key | |
|---|---|
| `step`, `tokens` | optimizer steps taken, and tokens trained on, masked ones included |
| `loss` | cross-entropy, nats per unmasked token, before the step |
| `grad_norm`, `learning_rate` | the global norm before clipping; the rate of this step |
| `seconds`, `tokens_per_second`, `mfu` | of a step, mean since the last record; without evaluation and saves |
| `data_wait` | share of that time in which this rank waited for its batches |
| `prediction_loss` | nats per token of the prediction modules, the mean over modules; with them only |

and, of a model with sparse layers, over the global batch of that step and its unmasked tokens alone

| key | |
|---|---|
| `load_balancing_loss`, `router_z_loss` | unweighted, mean over sparse layers; the former is 1 in balance |
| `tokens_per_expert` | [L][E]: choices of each expert of each sparse layer, bottom to top, dropped ones included |
| `max_violation` | largest load over mean load, minus 1, of the worst layer |
| `dead_experts` | experts of all layers without a token for 100 steps |
| `dropped` | share of the choices that found their expert full; with a capacity only |
| `per_layer` | an object of lists [L]: |
| ... `max_violation`, `dead_experts`, `dropped` | as above, layer by layer |
| ... `steps_since_use` | steps that the layer's longest unused expert has gone without a token |
| ... `load_entropy` | entropy of the load over log E: 1 is balance, 0 one expert |
| ... `router_entropy` | entropy of the mean of the tokens' probabilities over log E; 1: no expert is preferred |
| ... `token_entropy` | mean of the entropies of the tokens' probabilities over log E; 1: undecided, 0: certain |
| ... `logit_rms`, `logit_max` | of the router's logits: root mean square, and the largest absolute value |
| ... `log_sum_exp_max` | largest log of a token's summed exponentiated logits |
| ... `bias_min`, `bias_max` | range of the selection biases that routed the step; with them only |

Where `train.guard` lets steps be skipped, a training step has `skipped_steps` too, those so far. A skipped step has a
record of its own, whenever it comes, instead of that of a training step:

| key | |
|---|---|
| `step`, `skipped` | the step, and why it was skipped, in words |
| `skipped_loss`, `skipped_grad_norm` | its values, as `loss` and `grad_norm`; those that are finite |
| `skipped_in_a_row`, `skipped_steps` | skipped steps up to this one: without a step between, and in all |

A roll-back has `step`, `rolled_back_to` (the checkpoint's step), `skipped_steps` (with those it undid) and `roll_backs`
(so far); records of what it undid are dropped, but for those of skipped steps. Training that ends because it diverged
has `step` and `stopped`, the error, as its last record.

One of an evaluation has `step`, `validation_loss` (nats per token) and `bits_per_byte`. One of a checkpoint has
`step`, `checkpoint_bytes`, `checkpoint_held_seconds` (for which training stood still) and `checkpoint_write_seconds`
(in which it was hashed, written and synced); it comes when the save is complete, which may be after later steps.
TensorBoard gets every number, those of a layer as `NAME/layer_0`, `NAME/layer_1`, and so on. `moe.sparse.health` and
`moe.sparse.balance` hold the definitions and their sources.
"""

from moe.metrics.meter import Meter
from moe.metrics.tracker import Tracker

__all__ = ["Meter", "Tracker"]
