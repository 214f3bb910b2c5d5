"""Tuning of a language model on names: adapters, or every weight.

Dimension key beyond docs/architecture.md: `T` tokens of a packed row, `P` its labels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.advertiser.config import Config
from gr4ad_jax.advertiser.llama import LAYOUTS, Llama, causal
from gr4ad_jax.advertiser.texts import Batch
from gr4ad_jax.advertiser.weights import LanguageModel
from gr4ad_jax.training.task import Metrics, Task


def llama_of(model: LanguageModel, config: Config) -> Llama:
  """The decoder of a run, with adapters where they are tuned."""
  adapters = config.lora if config.tuning == "lora" else None
  return Llama(
    model.config, adapters, jnp.dtype(config.model.compute_dtype), config.model.remat
  )


def variables_of(model: LanguageModel, config: Config, params: Any) -> dict[str, Any]:
  """What `Llama.apply` takes, of the parameters that are tuned and the published ones."""
  if config.tuning == "lora":
    return {"params": model.params, "lora": params}
  return {"params": params}


def name_losses(llama: Llama, variables: dict[str, Any], batch: Batch) -> jax.Array:
  """-log p of each label, float32 [B, P]; 0 where there is none.

  Source: L_SFT = - sum_t log p(a+_t | prompt, a+_<t), over the tokens of names and their ends.
  """
  read = llama.apply(
    variables, batch.token_BT, position_BT=batch.position_BT, allow_BTS=causal(batch.segment_BT)
  )
  real_BP, at_BP = batch.label_BP >= 0, jnp.maximum(batch.label_BP, 0)
  state_BPD = jnp.take_along_axis(read.state_BTD, at_BP[..., None], axis=1)
  B, P, D = state_BPD.shape
  logit_NV = llama.apply(variables, state_BPD.reshape(B * P, D), method=Llama.logits)
  next_BP = jnp.take_along_axis(
    batch.token_BT, jnp.minimum(at_BP + 1, batch.token_BT.shape[1] - 1), axis=1
  )
  told_N = jnp.take_along_axis(logit_NV, next_BP.reshape(B * P, 1), axis=1)[:, 0]
  loss_N = jax.nn.logsumexp(logit_NV, axis=-1) - told_N
  return jnp.where(real_BP, loss_N.reshape(B, P), 0.0)


def name_task(model: LanguageModel, config: Config) -> Task:
  """Adapters beside frozen weights, or all weights.

  Of adapters the published weights are `Task.frozen`; tuned whole, they are where a training begins
  (`train_loop.train`'s `start_params`).
  """
  llama = llama_of(model, config)

  def metrics(variables: dict[str, Any], batch: Batch) -> Metrics:
    loss_BP = name_losses(llama, variables, batch)
    return {"loss": (loss_BP.sum(), (batch.label_BP >= 0).sum().astype(jnp.float32))}

  def draw(key: jax.Array) -> dict[str, Any]:
    token_BT = np.zeros((1, 1), np.int32)
    return llama.init(
      key, token_BT, position_BT=token_BT, allow_BTS=np.ones((1, 1, 1), bool), method=Llama.both
    )

  if config.tuning == "lora":
    return Task(
      lambda key: draw(key)["lora"],
      lambda params, batch, key, frozen: metrics({"params": frozen, "lora": params}, batch),
      LAYOUTS, frozen=lambda: model.params,
    )
  return Task(
    lambda key: draw(key)["params"], lambda params, batch, key: metrics({"params": params}, batch),
    LAYOUTS,
  )
