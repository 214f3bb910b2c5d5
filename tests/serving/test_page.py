"""The page in a real browser, without a screen: what its script has drawn."""

import re
import shutil
import subprocess

import pytest

from experiments._serving import running_server

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian package chromium)")
def test_the_page_shows_ads_their_paths_and_the_beams(served_run, tmp_path):
  options = ("--clock", "log", "--serving.batch-sizes", 1, "--serving.beam-factors", 1.0, 2.0)
  with running_server(served_run, tmp_path / "store", *options, log=tmp_path / "log") as server:
    done = subprocess.run(
      [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
       "--disable-background-networking", "--disable-component-update", "--disable-sync",
       f"--user-data-dir={tmp_path}/profile", "--window-size=390,800",
       "--virtual-time-budget=15000", "--dump-dom", server.url],
      capture_output=True, timeout=120, text=True,
    )
  page = done.stdout
  assert re.search(r'<h2 id="adsTitle">Ads \(12\), step 2', page), done.stderr[-500:]
  assert page.count('class="ad"') == 12 and page.count("expected ") >= 12
  # Nobody else asks: twice the base widths, but for those of the last level.
  for level, beams in ((1, 16), (2, 24), (3, 16)):
    assert f"level {level}: {beams} beams" in page
  assert "top-k and ranking" in page and 'role="alert"></p>' in page  # no error shown
