"""The notebooks as a reader meets them: JupyterLab in a real browser, every cell run from the menu.

Needs Chromium (Debian: apt install chromium). What the browser showed, from top to bottom, in the light theme and in
the dark one, is kept in build/screenshots/.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
SCREENSHOTS = ROOT / "build" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SETTINGS = {  # of JupyterLab, where they are not its own
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # a question, and the network
    "apputils-extension/themes": {"adaptive-theme": True},  # dark when the browser prefers it
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells are in the page, not only those in sight
}

sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open JupyterLab in")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The notebooks once more: JupyterLab writes what it runs."""
    folder = tmp_path_factory.mktemp("jupyterlab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    for name, values in SETTINGS.items():
        path = folder / f"config/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """What a running `jupyter lab` says of itself: url (on the loopback, at a free port) and token."""
    places = {f"JUPYTER_{place}_DIR": str(folder / place.lower()) for place in ("CONFIG", "DATA", "RUNTIME")}
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"], cwd=folder,
                                   env=environment, stdout=log, stderr=log)
    try:
        while not (found := list(folder.glob("runtime/jpserver-*.json"))):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield json.loads(found[0].read_text())
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def choose(page, menu: str, entry: str) -> None:
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem").filter(has=page.get_by_text(entry, exact=True)).click()


def keep_screenshot(page, path: Path) -> None:
    """From top to bottom: the window is made as high as the notebook."""
    page.locator(".jp-WindowedPanel-outer").evaluate("panel => panel.scrollTo(0, 0)")
    for _ in range(2):  # what comes into sight is laid out anew
        last = page.locator(".jp-Notebook .jp-Cell").last.bounding_box()
        page.set_viewport_size({"width": 1280, "height": round(last["y"] + last["height"]) + 60})
    path.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=path)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_all_cells_run_from_the_menu(folder, server, browser, name):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(f"{server['url']}lab/workspaces/{name}/tree/notebooks/{name}.ipynb?token={server['token']}")
    idle = page.locator("#jp-main-statusbar").get_by_text("| Idle")  # of the kernel
    idle.wait_for(timeout=60_000)

    choose(page, "Run", "Run All Cells")
    waiting = page.locator(".jp-CodeCell .jp-InputPrompt", has_text="[*]:")
    waiting.first.wait_for()
    sync_api.expect(waiting).to_have_count(0, timeout=300_000)
    idle.wait_for()
    choose(page, "File", "Save Notebook")
    sync_api.expect(page.locator(".jp-mod-dirty")).to_have_count(0)

    code = [cell for cell in json.loads((folder / "notebooks" / f"{name}.ipynb").read_text())["cells"]
            if cell["cell_type"] == "code"]
    errors = [output["evalue"] for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors and not complaints
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    solutions = sum(cell["metadata"].get("jupyter") == {"source_hidden": True} for cell in code)
    sync_api.expect(page.locator(".jp-InputPlaceholder")).to_have_count(solutions)

    keep_screenshot(page, SCREENSHOTS / f"{name}-light.png")
    page.emulate_media(color_scheme="dark")
    sync_api.expect(page.locator("body")).to_have_attribute("data-jp-theme-light", "false")
    sync_api.expect(page.locator("#jupyterlab-splash")).to_have_count(0)
    keep_screenshot(page, SCREENSHOTS / f"{name}-dark.png")
    choose(page, "Kernel", "Shut Down Kernel")  # or its memory is taken until the server stops
    page.close()
