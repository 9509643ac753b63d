"""Our models for `transformers`: importing this registers them with AutoConfig and AutoModelForCausalLM.

`AutoModelForCausalLM.from_pretrained(NATIVE_FOLDER)` then gives a `TurnoutForCausalLM`, which `generate`, HF's Trainer
and lm-evaluation-harness accept. There is no cache of keys and values: `generate` runs the whole text for each new
token.

B sequences, S positions, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import MergeModulelist, PrefixChange, WeightConverter
from transformers.modeling_outputs import CausalLMOutput

from moe.config import ModelConfig
from moe.errors import CheckpointError, ConfigError
from moe.hf.native import MODEL_TYPE, SECTION, VERSION, model_of, stored
from moe.hf.native_write import facts
from moe.hf.padding import Order
from moe.model import Transformer, initialize

_IGNORED = frozenset({"use_cache", "cache_position", "return_dict", "logits_to_keep"})
"""Arguments without effect on the result here; the others that `transformers` knows are refused when they are set."""


class TurnoutConfig(PreTrainedConfig):
    """Our model section, and the sizes that others look for under the names that they know."""

    model_type = MODEL_TYPE
    turnout: dict[str, Any] | None = None
    """The format's version and the model section; None makes no model."""
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    max_position_embeddings: int | None = None
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.turnout is not None:
            for key, value in facts(self.section).items():
                kwargs.pop(key, None)
                setattr(self, key, value)
        super().__post_init__(**kwargs)

    @property
    def section(self) -> ModelConfig:
        """The model section. Raises `CheckpointError` if there is none that this version reads."""
        return model_of({SECTION: self.turnout}, "config.json")

    @classmethod
    def of(cls, model: ModelConfig, **settings: Any) -> "TurnoutConfig":
        """The config of a model; `settings` such as special tokens go with it."""
        return cls(turnout={"version": VERSION, "model": model.model_dump(mode="json")}, **settings)


class TurnoutForCausalLM(PreTrainedModel, GenerationMixin):
    """Any model of ours. A fresh one is drawn from seed 0, as a recipe's would be."""

    config_class = TurnoutConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["Block"]  # noqa: RUF012  as transformers declares it
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["selection_bias_E"]  # noqa: RUF012

    def __init__(self, config: TurnoutConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.model = Transformer(config.section)
        self.post_init()

    @classmethod
    def of(cls, transformer: Transformer, **settings: Any) -> "TurnoutForCausalLM":
        """Around a model that has its weights; `settings` such as special tokens go into its config."""
        with torch.device("meta"):
            model = cls(TurnoutConfig.of(transformer.config, **settings))
        model.model = transformer
        return model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """Logits [B, S, V] of ids [B, S], and with `labels` (the ids themselves, -100 where none counts) the loss.

        The loss is the mean cross-entropy in nats of each label given those before it, or its sum over
        `num_items_in_batch`; balancing losses belong to `turnout train`. `attention_mask` [B, S] may leave out
        positions anywhere: the others close up, as if what is left out were not there. Raises `ConfigError` for
        arguments that would be without effect.
        """
        for name, value in others.items():
            if name not in _IGNORED and value is not None and value is not False:
                raise ConfigError(
                    f"{name} is given, but TurnoutForCausalLM has no use for it: it takes input_ids, attention_mask "
                    f"and labels. Remove it, or export the model to a stock architecture (`turnout export`)."
                )
        self.model.recompute = "block" if self.gradient_checkpointing and self.training else "none"
        order = Order.of(attention_mask, input_ids)
        logits_BSV = self.model(order.closed_up(input_ids), None, order.kept_BS)
        logits_BSV = order.put_back(logits_BSV)
        loss = None
        if labels is not None:
            next_BS = labels[:, 1:].to(logits_BSV.device)
            wide_BSV = logits_BSV[:, :-1].to(torch.promote_types(logits_BSV.dtype, torch.float32))
            nats = F.cross_entropy(
                wide_BSV.flatten(0, 1), next_BS.flatten(), ignore_index=-100, reduction="sum"
            )
            count = (next_BS != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = nats / count
        return CausalLMOutput(loss=loss, logits=logits_BSV)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        """The whole text each time: there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_input_embeddings(self) -> nn.Module:
        """[V, D]."""
        return self.model.embed

    def get_output_embeddings(self) -> nn.Module:
        """[V, D]."""
        return self.model.head

    def resize_token_embeddings(self, *_: Any, **__: Any) -> nn.Module:
        """Refused: the vocabulary is part of the model section."""
        raise ConfigError(
            f"the model has {self.config.vocab_size} rows for tokens, and a model of turnout keeps them. Use a "
            f"tokenizer of that many tokens or fewer, or resize the stock architecture (`turnout export`) and import "
            f"it again."
        )

    def initialize_weights(self) -> None:
        """Draw a fresh model's weights. Raises `CheckpointError` where a checkpoint has left some out."""
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        fresh = [
            name
            for name, tensor in tensors.items()
            if not getattr(tensor, "_is_hf_initialized", False) and name not in self.all_tied_weights_keys
        ]
        if len(fresh) == len(tensors.keys() - self.all_tied_weights_keys.keys()):
            initialize(self.model, 0)
        elif fresh:
            raise CheckpointError(
                f"the checkpoint lacks {fresh[0]} and {len(fresh) - 1} more weights: the model would be partly random. "
                f"Import or save it again."
            )

    @torch.no_grad()
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's; also what lies in a native folder's files, as HF's Trainer reads them when it resumes."""
        if not state_dict or any(key.startswith("model.") for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        homes = self._homes()
        missing, unexpected = (
            sorted(a - b) for a, b in ((homes.keys(), state_dict.keys()), (state_dict.keys(), homes.keys()))
        )
        if strict and (missing or unexpected):
            raise CheckpointError(
                f"the state lacks {missing[:3]} or holds {unexpected[:3]}, which the model does not."
            )
        for key, tensor in state_dict.items():
            if key in homes:
                homes[key].copy_(tensor)
        return _IncompatibleKeys(missing, unexpected)

    def _homes(self) -> dict[str, Tensor]:
        """A native folder's keys -> the tensors, or an expert's parts of them, that they stand for."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {
            key: part
            for tensor in stored(self.config.section)
            for key, part in zip(
                tensor.keys, tensors[tensor.name] if tensor.stacked else [tensors[tensor.name]], strict=True
            )
        }


AutoConfig.register(MODEL_TYPE, TurnoutConfig)
AutoModelForCausalLM.register(TurnoutConfig, TurnoutForCausalLM)
register_checkpoint_conversion_mapping(
    MODEL_TYPE,
    [
        PrefixChange(prefix_to_add="model"),
        *(
            WeightConverter(f"ffn.experts.*.{own}", f"ffn.experts.{own}", operations=[MergeModulelist(dim=0)])
            for own in ("gate_up", "down", "gate_up_bias", "down_bias")
        ),
    ],
)
