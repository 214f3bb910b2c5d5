"""Optimizer, step, checkpoints, and which parameters a run gives: training/, gr4ad/run.py."""

from tests.mutants.mutant import Mutant

_OPTIMIZER, _STEP = "training/optimizer.py", "training/train_step.py"
_TESTS = "training/test_optimizer.py::"
_ADAMW = (_TESTS + "test_three_steps_of_adamw_by_hand",)
_RATE = (_TESTS + "test_the_rate_rises_in_a_line_and_falls_along_a_cosine",)

_AVERAGE = _TESTS + "test_an_average_of_the_parameters_is_kept_and_given"
_BEST, _PATIENCE = (
  "training/test_selection.py::test_the_checkpoint_with_the_best_recall_is_kept_and_given",
  "training/test_selection.py::test_patience_ends_a_run_which_then_is_complete",
)
_REFIT = ("training/test_train.py::"
          "test_a_refit_learns_from_validation_requests_too_and_only_test_judges_it")

MUTANTS = (
  Mutant(
    "weights decay in matrices alone, not in biases and scales", _OPTIMIZER,
    "p.ndim >= 2", "p.ndim >= 1", _ADAMW,
  ),
  Mutant(
    "the second moment forgets within twenty steps", _OPTIMIZER, "b2=0.95", "b2=0.999", _ADAMW,
  ),
  Mutant(
    "gradients are clipped", _OPTIMIZER,
    "    return optax.chain(clip, adamw)", "    return adamw", _ADAMW,
  ),
  Mutant(
    "the gradient is clipped, not the step", _OPTIMIZER,
    "    return optax.chain(clip, adamw)", "    return optax.chain(adamw, clip)", _ADAMW,
  ),
  Mutant(
    "the rate ends at a share of its peak", _OPTIMIZER,
    "end_value=config.learning_rate * config.final_learning_rate_share", "end_value=0.0", _RATE,
  ),
  Mutant(
    "the rate warms up for a share of the steps", _OPTIMIZER,
    "max(1, round(config.warmup_share * config.num_steps))", "1", _RATE,
  ),
  Mutant(
    "a table has a rate of its own", _OPTIMIZER,
    "optax.scale_by_learning_rate(config.table_learning_rate)",
    "optax.scale_by_learning_rate(config.learning_rate)",
    ("training/test_id_table.py::test_without_a_rate_of_its_own_everything_is_adamw",),
  ),
  Mutant(
    "a row's statistic is summed over steps", _OPTIMIZER,
    "s + jnp.mean(g * g, axis=-1, keepdims=True)", "jnp.mean(g * g, axis=-1, keepdims=True)",
    ("training/test_id_table.py::test_row_adagrad_by_hand",),
  ),
  Mutant(
    "a step follows the mean over the batch", _STEP,
    "grads = jax.tree.map(lambda g: g / weight, grads)", "grads = jax.tree.map(jnp.array, grads)",
    (_TESTS + "test_a_step_follows_the_mean_over_the_batch_and_draws_anew",),
  ),
  Mutant(
    "every step draws its own dropout", _STEP,
    "jax.random.fold_in(jax.random.key(seed), state.step)", "jax.random.key(seed)",
    (_TESTS + "test_a_step_follows_the_mean_over_the_batch_and_draws_anew",),
  ),
  Mutant(
    "every part of a batch draws its own dropout", _STEP,
    "gradient(params, rows, jax.random.fold_in(key, number))", "gradient(params, rows, key)",
    (_TESTS + "test_parts_of_a_batch_draw_for_themselves",),
  ),
  Mutant(
    "the best checkpoint has the smallest loss", "training/checkpoint.py",
    "return min(measured, key=lambda c: (_cost(c.metrics), -c.step)).step",
    "return max(measured, key=lambda c: (_cost(c.metrics), -c.step)).step",
    (_TESTS + "test_the_best_checkpoint_has_the_lowest_validation_loss_and_is_kept",),
  ),
  Mutant(
    "the best checkpoint is kept", "training/checkpoint.py",
    "get_metric_fn=lambda metrics: -_cost(metrics)",
    "get_metric_fn=lambda metrics: _cost(metrics)",
    (_TESTS + "test_the_best_checkpoint_has_the_lowest_validation_loss_and_is_kept",),
  ),
  Mutant(
    "what is open of a save is closed", "training/checkpoint.py", "      saving.result()\n", "",
    ("training/test_checkpoint.py::test_nothing_stays_open_of_a_save",),
  ),
  Mutant(
    "a run gives its best parameters, not its last", "training/checkpoint.py",
    "if not newest and (best := self.best_step) is not None:",
    "if newest and (best := self.best_step) is not None:",
    (_TESTS + "test_the_best_checkpoint_has_the_lowest_validation_loss_and_is_kept",),
  ),
  Mutant(
    "the best checkpoint has the highest score, where there is one", "training/checkpoint.py",
    'return -metrics["score"] if', 'return metrics["score"] if', (_BEST,),
  ),
  Mutant(
    "of scores a larger one is better", "training/selection.py",
    'sign = -1 if self._name == "loss" else 1', "sign = -1", (_BEST,),
  ),
  Mutant(
    "an equal validation is no better one", "training/selection.py",
    "0 if gain > 0 else", "0 if gain >= 0 else", (_PATIENCE,),
  ),
  Mutant(
    "a stopped run counts the validations before", "training/train_loop.py",
    'selection = Selection(config, (row for row in earlier if row["step"] <= first_step))',
    "selection = Selection(config)", (_PATIENCE,),
  ),
  Mutant(
    "the average is validated, where there is one", "training/train_loop.py",
    "self._validate(step, state.served)", "self._validate(step, state.params)", (_BEST,),
  ),
  Mutant(
    "an average soon forgets the start", _STEP,
    "decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))", "decay = jnp.float32(decay)",
    (_AVERAGE,),
  ),
  Mutant(
    "a run gives its average", "training/checkpoint.py",
    'name = "params" if abstract.ema is None else "ema"', 'name = "params"', (_AVERAGE,),
  ),
  Mutant(
    "a constant rate falls at last", _OPTIMIZER, "config.num_steps - decay)", "config.num_steps)",
    (_TESTS + "test_the_rate_can_stay_at_its_peak_until_it_falls_in_a_line",),
  ),
  Mutant(
    "a refit makes as many passes as were best", "training/refit.py",
    "round(step * (learned + added) / learned)", "step", (_REFIT,),
  ),
  Mutant(
    "a refit learns from validation requests, too", "gr4ad/train_run.py",
    'for split in ("train", "validation")]', 'for split in ("train", "train")]', (_REFIT,),
  ),
  Mutant(
    "validation cannot judge what has learned from it", "evaluation/evaluate.py",
    "if split not in opened.held_out:", "if not opened.held_out:", (_REFIT,),
  ),
  Mutant(
    "validation judges requests that nothing is learned from", "gr4ad/train_run.py",
    'inputs.examples.sources["validation"]', 'inputs.examples.sources["train"]',
    ("training/test_train.py::"
     "test_a_run_learns_from_training_requests_and_is_validated_on_others",),
  ),
  Mutant(
    "a mean over steps weighs each by what it counted", "training/metric_log.py",
    "pair[1] += float(np.asarray(count))", "pair[1] += 1.0",
    (_TESTS + "test_means_are_of_all_that_was_counted_and_begin_anew",),
  ),
  Mutant(
    "a run that learned from lists gives its last parameters", "gr4ad/run.py",
    'bool(run.refit or run.segments or (run.lists and run.config.train.best_by == "loss"))',
    "bool(run.refit or run.segments)",
    ("gr4ad/test_candidates.py::test_training_on_lists_starts_from_a_run_and_resumes_exactly",),
  ),
  Mutant(
    "a learner goes on at a share of the run's rate", "gr4ad/online.py",
    "learning_rate=config.learning_rate_share * train.learning_rate",
    "learning_rate=train.learning_rate",
    ("gr4ad/test_candidates.py::test_online_learning_without_a_reward_model_and_its_mistakes",),
  ),
  Mutant(
    "a segment is judged before it is learned from", "gr4ad/online.py",
    '"loss_before": before.get("loss", math.nan)', '"loss_before": after.get("loss", math.nan)',
    ("gr4ad/test_candidates.py::test_online_learning_without_a_reward_model_and_its_mistakes",),
  ),
  Mutant(
    "a run that goes on learning gives its last parameters", "gr4ad/run.py",
    "bool(run.refit or run.segments or (", "bool(run.refit or (",
    ("gr4ad/test_candidates.py::test_training_on_lists_starts_from_a_run_and_resumes_exactly",),
  ),
)
