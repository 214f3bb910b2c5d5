"""Matrix products are counted as they are written, in loops as often as they run."""

import jax
import jax.numpy as jnp
import pytest

from gr4ad_jax.training.flops import example_flops, matmul_flops
from gr4ad_jax.training.task import Task

A, B = jnp.ones((3, 5)), jnp.ones((5, 7))
ONCE = 2 * 3 * 5 * 7


def test_products_by_hand():
  assert matmul_flops(jnp.matmul, A, B) == ONCE
  assert matmul_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), *(
    jnp.ones((4, *x.shape)) for x in (A, B)
  )) == 4 * ONCE
  assert matmul_flops(lambda a: jnp.sum(jnp.exp(a)), A) == 0
  assert matmul_flops(jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b) + a @ b), A, B) == (
    2 * ONCE
  )


def test_loops_count_as_often_as_they_run_and_branches_as_the_dearest():
  def loop(a, b):
    return jax.lax.scan(lambda sum_, _: (sum_ + a @ b, None), jnp.zeros((3, 7)), None, length=6)[0]

  assert matmul_flops(loop, A, B) == 6 * ONCE
  assert matmul_flops(
    lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: a @ b + a @ b, lambda: a @ b), A, B
  ) == 2 * ONCE
  with pytest.raises(ValueError, match="loop of unknown length"):
    matmul_flops(lambda a: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, a), A[:, :3])
  counted = jax.lax.while_loop  # a loop without a product in it is nothing
  assert matmul_flops(lambda a: counted(lambda x: x[0, 0] < 9, lambda x: x + 1, a) @ B, A) == ONCE


def test_learning_costs_the_product_and_its_two_gradients():
  def loss(params, batch, key):
    return {"loss": (jnp.sum(jnp.sin(batch @ params["w"]) @ params["v"]), jnp.float32(1))}

  task = Task(lambda key: {"w": jnp.ones((5, 7)), "v": jnp.ones((7, 2))}, loss)
  first, second = 2 * 3 * 5 * 7, 2 * 3 * 7 * 2
  # Nothing is learned of the batch, so that the first product has one gradient.
  assert example_flops(task, A) == 2 * first + 3 * second
