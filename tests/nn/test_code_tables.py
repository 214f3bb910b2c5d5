"""Code tables: what an input is made of."""

import jax
import jax.numpy as jnp
import numpy as np

from gr4ad_jax.nn.code_tables import CodeTables


def test_an_input_token_is_the_square_root_of_the_width_times_a_row():
  tables = CodeTables(16, (7, 5, 6))
  params = tables.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32), method="embed_all")
  rows = [np.asarray(params["params"][f"level_{level}"]) for level in range(3)]
  got = tables.apply(params, jnp.array([4, -1]), 1, method="embed")
  np.testing.assert_allclose(got, [4 * rows[1][4], np.zeros(16)], rtol=1e-6)  # 4 = 16 ** .5
  whole = tables.apply(params, jnp.array([6, 0, 5]), method="embed_all")
  np.testing.assert_allclose(whole, 4 * (rows[0][6] + rows[1][0] + rows[2][5]), rtol=1e-5)
