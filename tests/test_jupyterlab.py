"""The notebooks as a reader meets them: JupyterLab in a real browser, every cell run from the menu.

Needs Chromium or Chrome on the PATH (Debian: apt install chromium). What the browser showed, from top to bottom, in
the light theme and in the dark one, is kept in build/screenshots/; of a notebook that failed, what it showed then.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("jupyterlab")
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
SCREENSHOTS = ROOT / "build" / "screenshots"
BROWSERS = ("chromium", "google-chrome", "chromium-browser")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
SETTINGS = {  # of JupyterLab, where they are not its own
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # a question, and the network
    "apputils-extension/themes": {"adaptive-theme": True},  # dark when the browser prefers it
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, not only those in sight
}
HIGH = 6000  # pixels of a screenshot
PATIENCE = 60  # seconds for a step; the cells themselves have longer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(BROWSERS)} is on the PATH"),
]
sync_api.expect.set_options(timeout=1000 * PATIENCE)


@pytest.fixture
def lab(tmp_path):
    """The address of a running `jupyter lab`, for a notebook's name; with the test it ends, and its kernel with it."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")  # JupyterLab writes what it runs
    for name, values in SETTINGS.items():
        path = tmp_path / f"config/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    places = {f"JUPYTER_{place}_DIR": str(tmp_path / place.lower()) for place in ("CONFIG", "DATA", "RUNTIME")}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # a free port
        port = probe.getsockname()[1]
    url, token, log = f"http://127.0.0.1:{port}", secrets.token_hex(), tmp_path / "log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    environment = os.environ | places | {"JUPYTER_TOKEN": token}
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file)
    try:
        wait_for(f"{url}/api", process, log)
        yield lambda name: f"{url}/lab/tree/notebooks/{name}.ipynb?token={token}"
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        print(log.read_text())  # pytest shows it beside a failure


def wait_for(url: str, process, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:  # it does not listen yet
            time.sleep(0.1)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, name):
    for old in SCREENSHOTS.glob(f"{name}-*.png"):
        old.unlink()
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(1000 * PATIENCE)
    yield page
    if not (SCREENSHOTS / f"{name}-dark-1.png").exists():
        page.screenshot(path=SCREENSHOTS / f"{name}-failed.png")
    page.close()


def choose(page, menu: str, entry: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem").filter(has=page.get_by_text(entry, exact=True)).click()


def keep_screenshots(page, name: str) -> None:
    """From top to bottom, as many as it takes: Chromium paints no page that is as high as a notebook."""
    page.set_viewport_size({"width": 1280, "height": HIGH})
    panel, top = page.locator(".jp-WindowedPanel-outer"), 0
    for part in range(1, 20):
        panel.evaluate("(panel, top) => panel.scrollTo(0, top)", top)
        page.wait_for_timeout(500)  # what comes into sight is laid out anew
        page.screenshot(path=SCREENSHOTS / f"{name}-{part}.png")
        last = page.locator(".jp-Notebook .jp-Cell").last.bounding_box()
        if last["y"] + last["height"] < HIGH:
            return
        top += panel.evaluate("panel => panel.clientHeight")
    raise AssertionError("the layout does not come to rest")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_all_cells_run_from_the_menu(lab, page, name, tmp_path):
    exceptions = []
    page.on("pageerror", lambda error: exceptions.append(str(error)))
    page.goto(lab(name))
    idle = page.locator("#jp-main-statusbar").get_by_text("| Idle")  # of the kernel
    idle.wait_for()

    choose(page, "Run", "Run All Cells")
    waiting = page.locator(".jp-CodeCell .jp-InputPrompt", has_text="[*]:")
    waiting.first.wait_for()
    sync_api.expect(waiting).to_have_count(0, timeout=300_000)
    idle.wait_for()
    choose(page, "File", "Save Notebook")
    sync_api.expect(page.locator(".jp-mod-dirty")).to_have_count(0)

    ran, stored = ([cell for cell in notebook["cells"] if cell["cell_type"] == "code"] for notebook in (
        json.loads((tmp_path / "notebooks" / f"{name}.ipynb").read_text()), NOTEBOOKS[name]))
    assert not [output["evalue"] for cell in ran for output in cell["outputs"] if output["output_type"] == "error"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(stored) + 1))
    solutions = sum("jupyter" in cell["metadata"] for cell in stored)
    sync_api.expect(page.locator(".jp-InputPlaceholder")).to_have_count(solutions)  # all of them are shut

    keep_screenshots(page, f"{name}-light")
    page.emulate_media(color_scheme="dark")
    sync_api.expect(page.locator("body")).to_have_attribute("data-jp-theme-light", "false")
    sync_api.expect(page.locator("#jupyterlab-splash")).to_have_count(0)
    keep_screenshots(page, f"{name}-dark")
    assert not exceptions
