"""A map of embeddings in the plane: by the ads' groups, and by their first codes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gr4ad_jax.embedding.rows import distinct_rows
from gr4ad_jax.report.plots import Figure, map_plot
from gr4ad_jax.tokenizer.retrieval import unit_rows

NUM_COLOURS = 8  # of the page's style, without that of the rest
MAX_POINTS = 2_000  # of a map: a few seconds of t-SNE
NUM_NAMED = 7  # groups with a colour of their own in the map; the others share one


class EmbeddingMap(NamedTuple):
  """Pictures of the same points, none where there are too few."""

  words: str
  figures: list[Figure]


def embedding_map(
  embedding_AD: np.ndarray,
  code_A: np.ndarray,
  *,
  group_A: np.ndarray | None,
  group_name: str,
  seed: int,
) -> EmbeddingMap:
  """Pictures of at most `MAX_POINTS` different embeddings.

  Args:
    embedding_AD: [A, D].
    code_A: [A] the first code of each ad.
    group_A: [A] names that colour a picture of their own; "" = unknown.
    group_name: what they are.
    seed: of the sample and of t-SNE.
  """
  embedding_AD = np.asarray(embedding_AD, np.float32)
  first_U = distinct_rows(embedding_AD).first_U
  row_N = np.random.default_rng(seed).permutation(first_U)[:MAX_POINTS]
  point_N2 = two_dimensions(embedding_AD[row_N], seed=seed)
  if point_N2 is None:
    return EmbeddingMap(f"{len(row_N)} different embeddings are too few for a map.", [])
  figures = []
  if group_A is not None:
    colour_N, legend = _largest_groups(np.asarray(group_A).astype(str)[row_N])
    figures.append(Figure(
      "Embeddings",
      f"coloured by {group_name}. Clumps of one colour say that the embedding knows the "
      f"{group_name}; colours mixed everywhere say that it does not, and codes cannot either.",
      map_plot(point_N2, colour_N, title=f"Embeddings by {group_name}"), legend,
    ))  # fmt: skip
  centre_N2, colour_N = code_centres(point_N2, code_A[row_N])
  figures.append(Figure(
    "First codes",
    "each dot tied to the middle of its first code (colours repeat). Short ties are good: near ads "
    "begin with one code. Lines across the map say that level 1 does not follow the embedding.",
    map_plot(point_N2, colour_N, title="Embeddings by first code", centre_N2=centre_N2),
  ))  # fmt: skip
  words = (
    f"t-SNE of {len(row_N):,} of {len(first_U):,} different embeddings, a dot each. Near dots are "
    "near embeddings; distances between clumps, and their sizes, mean nothing."
  )
  return EmbeddingMap(words, figures)


def _largest_groups(name_N: np.ndarray) -> tuple[np.ndarray, list[tuple[int, str]]]:
  """Colours 1.. for the largest named groups and 0 for the rest, with the legend's entries."""
  names, of_N, count_G = np.unique(name_N, return_inverse=True, return_counts=True)
  order_G = [g for g in np.argsort(-count_G, kind="stable") if names[g]][:NUM_NAMED]
  colour_G = np.zeros(len(names), int)
  colour_G[order_G] = np.arange(len(order_G)) + 1
  legend = [(i + 1, str(names[g])) for i, g in enumerate(order_G)]
  if not colour_G.all():
    legend.append((0, "others"))
  return colour_G[of_N.reshape(-1)], legend


def code_centres(point_N2: np.ndarray, code_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where the codes of points lie, and colours for them, so that codes which lie close differ.

  Args:
    point_N2: [N, 2] places.
    code_N: [N] codes; the largest choose first, each the colour whose nearest code is farthest.

  Returns:
    [N, 2], for each point the median place of its code (a few strays do not move it); and [N]
    colours, 1 to `NUM_COLOURS`.
  """
  _, of_N, count_C = np.unique(code_N, return_inverse=True, return_counts=True)
  of_N = of_N.reshape(-1)
  groups = np.split(np.argsort(of_N, kind="stable"), count_C.cumsum()[:-1])
  centre_C2 = np.stack([np.median(point_N2[rows], axis=0) for rows in groups])
  colour_C = np.zeros(len(count_C), int)
  for c in np.argsort(-count_C, kind="stable"):
    distance_C = np.square(centre_C2 - centre_C2[c]).sum(-1)
    nearest_K = [distance_C[colour_C == k + 1].min(initial=np.inf) for k in range(NUM_COLOURS)]
    colour_C[c] = np.argmax(nearest_K) + 1
  return centre_C2[of_N], colour_C[of_N]


def two_dimensions(x_ND: np.ndarray, *, seed: int) -> np.ndarray | None:
  """t-SNE of the rows' directions; None for fewer than five rows.

  Args:
    x_ND: [N, D] finite, distinct.
    seed: the same seed gives the same map.

  Returns:
    [N, 2].

  Source: van der Maaten and Hinton (2008), as scikit-learn has it.
  """
  if len(x_ND) < 5:
    return None
  from sklearn.manifold import TSNE  # slow to import, and only needed here
  from threadpoolctl import threadpool_limits

  unit_ND = unit_rows(x_ND)
  flat = unit_ND.shape[1] < 2 or np.ptp(unit_ND, axis=0).max() < 1e-6
  tsne = TSNE(
    init="random" if flat else "pca",
    perplexity=min(30.0, (len(x_ND) - 1) / 3),
    random_state=seed,
  )
  with threadpool_limits(1):  # its threads wait for each other: 9 s alone, 80 s on a busy machine
    return tsne.fit_transform(unit_ND)
