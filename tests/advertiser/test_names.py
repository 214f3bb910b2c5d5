"""Names that are one, titles that tell no name twice, prompts of whole entries."""

import pytest

from gr4ad_jax.advertiser.names import merge_names, title_without
from gr4ad_jax.advertiser.prompts import END, TASK, Known, write_prompt


def test_spellings_that_differ_in_case_and_width_are_one_advertiser():
  spelling = ["Kamo", "Acme", "KAMO", "Kamo", "\uff21cme", "", "unknown", "A|b:c"]
  names = merge_names(spelling)
  assert names.name_A.tolist() == ["A b c", "Acme", "Kamo"]
  assert names.advertiser_N.tolist() == [2, 1, 2, 2, 1, -1, -1, 0]
  assert names.merged == [["Acme", "\uff21cme"], ["KAMO", "Kamo"]]
  assert merge_names(spelling[::-1]).name_A.tolist() == names.name_A.tolist()


@pytest.mark.parametrize(("name", "text", "title"), [
  ("Arm & Hammer", "Arm &amp; Hammer - Tooth paste", "Tooth paste"),
  ("SE", "se SE 12-piece set", "12-piece set"),
  ("SE", "Seaside kit", "Seaside kit"),
  ("uxcell", "uxcell", ""),
  ("", "a | b\n c", "a b c"),
])
def test_a_title_does_not_begin_with_its_name(name, text, title):
  assert title_without(name, text, most_chars=80) == title


def test_a_title_ends_between_words():
  assert title_without("", "one two three", most_chars=8) == "one two"
  assert title_without("", "one two three", most_chars=7) == "one two"
  assert title_without("", "abcdefgh", most_chars=3) == "abc"


KNOWN = Known(
  popular=["P1", "P2"], profile="city x", converted=[("Acme", 2, 3), ("Kamo", 1, -1)],
  lately=["saw", "drill"],
)


def test_a_prompt_word_by_word():
  assert write_prompt(KNOWN, most_chars=1000) == (
    f"{TASK}\nUser: city x\nPopular: P1 | P2\nConverted with: Acme (2, 3 d) | Kamo (1)\n"
    f"Lately: saw | drill\n{END}"
  )


def test_a_prompt_loses_popular_names_then_titles_then_conversions_and_only_whole_ones():
  seen = [write_prompt(KNOWN, most_chars=most) for most in range(200, 0, -1)]
  lines = list(dict.fromkeys(text.removeprefix(TASK).removesuffix(END) for text in seen))
  profile, bought = "\nUser: city x\n", "Converted with: Acme (2, 3 d) | Kamo (1)\n"
  assert lines == [
    f"{profile}Popular: P1 | P2\n{bought}Lately: saw | drill\n",
    f"{profile}Popular: P1\n{bought}Lately: saw | drill\n",
    f"{profile}{bought}Lately: saw | drill\n", f"{profile}{bought}Lately: saw\n",
    f"{profile}{bought}", f"{profile}Converted with: Acme (2, 3 d)\n", profile,
  ]
