"""The page of fedray report in a browser: by mouse and keyboard, in the dark, on paper, on a phone."""

import base64
import json
import os
import re
import shutil
from dataclasses import replace

import pytest
from axe_core_python.selenium import Axe
from pages import EVIL, write_run, write_sweep
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

import fedray
from fedray.cli import main
from fedray.reports import page as page_module


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium without a network."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver) and "CI" not in os.environ:
        pytest.skip("chromium and chromedriver are not installed")
    assert chromium, "chromium is not installed"
    assert driver, "chromedriver is not installed"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
    ):  # fmt: skip
        options.add_argument(argument)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


def look_at(browser, path, width, height=900):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(path.as_uri())
    assert "fedray report" in browser.title


def find(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector)


def chart_of(browser, title):
    return find(browser, f'.chart[aria-label^="{title}"]')


def hovered(browser, title, point):
    """What is shown when the mouse is on a point of a chart."""
    chart = chart_of(browser, title)
    x, y = browser.execute_script(
        """const [chart, at] = arguments, {x, y} = chart.scales, point = chart.points[at];
        chart.scrollIntoView({block: "center"});
        const box = chart.querySelector("svg").getBoundingClientRect();
        return [box.left + x.apply(point.x) + (x.bandwidth ?? 0) / 2, box.top + y.apply(point.y)];
        """,
        chart, point,
    )  # fmt: skip
    mouse = ActionChains(browser)
    mouse.w3c_actions.pointer_action.move_to_location(round(x) - 3, round(y) - 3)
    mouse.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    mouse.perform()

    def lines(_):
        script = "return [...arguments[0].querySelectorAll(arguments[1])].map(line => line.textContent)"
        return browser.execute_script(script, chart, '[aria-label="tip"] text > tspan')

    return "\n".join(line.strip("\u200b ") for line in WebDriverWait(browser, 10).until(lines))


def shown(browser, kind):
    """The pictures that a viewer shows, by run, and what stands beside its slider."""
    viewer = find(browser, f".viewer.{kind}")
    pictures = [picture for picture in viewer.find_elements(By.TAG_NAME, "img") if picture.is_displayed()]
    for picture in pictures:
        assert browser.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 0", picture)
    return [picture.get_attribute("src") for picture in pictures], viewer.find_element(By.TAG_NAME, "output").text


def assert_quiet(browser):
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def assert_accessible(browser):
    """axe finds nothing serious."""
    found = Axe().run(browser)["violations"]
    serious = [each for each in found if each["impact"] in ("serious", "critical")]
    assert [(each["id"], [node["html"][:200] for node in each["nodes"][:3]]) for each in serious] == []


def emulate(browser, dark=False, media=""):
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def background(browser):
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


@pytest.mark.slow
def test_a_runs_page_in_a_browser(tmp_path, browser):
    config = replace(
        fedray.PRESETS["digits"], rounds=3, local_epochs=None, local_steps=2, evaluate_every=1, evaluate_samples=16,
        sampling_steps=2, kid_subset_size=8, actors=0,
    )  # fmt: skip
    run = fedray.run(config, tmp_path / "run")
    assert main(["report", str(run.directory)]) == 0
    page = run.directory / "report.html"
    assert page.stat().st_size < 1_000_000

    look_at(browser, page, 1200)
    source = {k: as_data(run.directory / f"samples/round-{k:06d}.png") for k in (1, 2, 3)}
    assert shown(browser, "samples") == ([source[3]], "round 3")
    slider = find(browser, ".viewer.samples input")
    slider.send_keys(Keys.ARROW_LEFT)
    assert shown(browser, "samples") == ([source[2]], "round 2")
    slider.send_keys(Keys.HOME)
    assert shown(browser, "samples") == ([source[1]], "round 1")
    assert slider.get_attribute("aria-valuetext") == "round 1"

    for title, name in (("fd[digits] over rounds", "fd[digits]"), ("Training loss over rounds", "training loss")):
        row = run.rows[1]
        value = row["loss"] if name == "training loss" else row["scores"][name]["value"]
        text = hovered(browser, title, 1)
        assert "round 2" in text
        assert float(text.split(name)[1].replace(",", "")) == pytest.approx(value, rel=1e-3)

    # Against steps: two for each round.
    Select(find(browser, ".axis")).select_by_visible_text("sequential steps")
    points = "return arguments[0].points.map(point => point.x)"
    assert browser.execute_script(points, find(browser, ".chart")) == [2, 4, 6]

    # Bars of a round's parts are as high as all that the round took.
    text = hovered(browser, "Where the seconds of a round went", 1)
    parts = {part: run.rows[1]["seconds"][part] for part in ("training", "save", "evaluate")}
    said = dict(line.rsplit(" ", 1) for line in text.splitlines()[1:])
    names = {"training": "training", "save": "checkpoint", "evaluate": "evaluation"}
    assert {part: float(said[names[part]]) for part in parts} == pytest.approx(parts, rel=1e-2)
    whole = sum(seconds for name, seconds in run.rows[1]["seconds"].items() if name != "round")
    assert float(text.split(": ")[1].split(" ")[0]) == pytest.approx(whole, rel=1e-2)

    assert_accessible(browser)
    assert_fits(browser, page)
    assert_quiet(browser)


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory):
    """A sweep of nine settings, and a run with a name that is markup; and pictures."""
    root = tmp_path_factory.mktemp("page")
    sweep = write_sweep(root / "sweep", {clients: [5.0, 6.5] for clients in (2, 4, 8, 16, 32, 64, 128, 256, 512)})
    write_run(root / "run", [5.0], partition=EVIL, held_out=True)
    page_module.write([sweep, root / "run"], root / "page.html")
    return root / "page.html"


@pytest.mark.slow
def test_a_sweeps_page_in_a_browser(sweep_page, browser):
    look_at(browser, sweep_page, 1200)
    text = hovered(browser, "fd[digits] after the last round", 1)
    assert "clients=4" in text
    assert "5.75" in text
    assert "5.000 to 6.500 over 2 seeds" in text
    with pytest.raises(Exception, match="no such alert"):
        browser.switch_to.alert  # noqa: B018
    assert_accessible(browser)
    assert_fits(browser, sweep_page)
    assert_accessible(browser)
    assert_quiet(browser)


@pytest.mark.slow
def test_what_is_ticked_is_compared(sweep_page, browser):
    look_at(browser, sweep_page, 1200)
    chapter = find(browser, ".chapter")
    assert len(shown(browser, "samples")[0]) == 9
    rows = "return [...document.querySelector('.chapter').querySelectorAll('tr[data-of]')]"
    rows += ".filter(row => row.offsetParent).length"
    before = browser.execute_script(rows)
    chapter.find_element(By.CSS_SELECTOR, ".none").click()
    assert shown(browser, "samples")[0] == []
    boxes = chapter.find_elements(By.CSS_SELECTOR, ".compare input")
    for index in (1, 3):
        boxes[index].send_keys(Keys.SPACE)
    assert len(shown(browser, "samples")[0]) == 2
    names = [caption.text for caption in chapter.find_elements(By.CSS_SELECTOR, ".samples figcaption")]
    assert [name for name in names if name] == ["clients=4, seed 0", "clients=16, seed 0"]
    first, loss = chart_of(browser, "fd[digits] after"), chart_of(browser, "Training loss over rounds")
    across = "return arguments[0].points.map(point => point.x)"
    assert browser.execute_script(across, first) == [4, 16]
    assert browser.execute_script(across, loss) == [1, 2, 3] * 2
    legend = loss.find_element(By.XPATH, "following-sibling::ul")
    assert legend.text.splitlines() == ["clients=4", "clients=16"]
    assert browser.execute_script(rows) * 9 == before * 2
    chapter.find_element(By.CSS_SELECTOR, ".all").click()
    assert browser.execute_script(rows) == before


@pytest.mark.slow
def test_tables_sort_by_the_head_that_is_pressed(tmp_path, browser):
    run = write_run(tmp_path / "run", [5.0])
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    losses = {0: 0.5, 1: 12.0, 2: 3.0, 10: 0.25}
    for row in rows:
        row["clients"] = [row["clients"][0] | {"client": client, "loss": loss} for client, loss in losses.items()]
    rows[-1]["clients"][1] |= {"loss": None, "outcome": "its camera is broken"}
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page_module.write([run], tmp_path / "page.html")
    look_at(browser, tmp_path / "page.html", 1200)
    table = find(browser, ".clients table")

    def column(number):
        return [cell.text for cell in table.find_elements(By.CSS_SELECTOR, f"tbody tr > :nth-child({number})")]

    assert column(1) == ["0", "1", "2", "10"]
    heads = {head.text.split(" ")[0]: head for head in table.find_elements(By.CSS_SELECTOR, "thead th")}
    loss = heads["loss"].find_element(By.TAG_NAME, "button")
    loss.send_keys(Keys.ENTER)
    assert column(1) == ["10", "0", "2", "1"]
    assert heads["loss"].get_attribute("aria-sort") == "ascending"
    loss.send_keys(Keys.ENTER)
    assert column(1) == ["1", "2", "0", "10"]
    assert heads["loss"].get_attribute("aria-sort") == "descending"
    heads["client"].find_element(By.TAG_NAME, "button").click()
    assert column(1) == ["0", "1", "2", "10"]  # as numbers
    assert heads["loss"].get_attribute("aria-sort") is None
    assert column(2) == ["3", "2", "3", "3"]  # rounds that it took part in
    assert column(9) == ["0", "1", "0", "0"]


@pytest.mark.slow
def test_all_is_reached_and_read_by_keyboard(sweep_page, browser):
    look_at(browser, sweep_page, 1200)
    wanted = "input:not([hidden]), select, button, .chart, summary, .wide, pre"
    count = "return [...document.querySelectorAll(arguments[0])].filter(element => element.checkVisibility()).length"
    every = browser.execute_script(count, wanted)
    reached = set()
    for _ in range(every + 5):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.add(browser.switch_to.active_element)
    matches = "return arguments[0].matches(arguments[1])"
    assert sum(browser.execute_script(matches, element, wanted) for element in reached) == every > 20
    chart = chart_of(browser, "fd[digits] after the last round")
    reading = chart.find_element(By.XPATH, "following-sibling::p")
    chart.send_keys(Keys.ARROW_RIGHT)
    assert reading.text == "clients=2 · fd[digits] 5.750 · 5.000 to 6.500 over 2 seeds"
    chart.send_keys(Keys.ARROW_RIGHT)
    assert reading.text.startswith("clients=4 · ")
    chart.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert reading.text.startswith("clients=512 · ")


@pytest.mark.slow
def test_in_the_dark_and_on_paper(sweep_page, browser):
    try:
        emulate(browser, dark=True)
        look_at(browser, sweep_page, 1200)
        assert background(browser) == "rgb(22, 25, 29)"
        ink = "return getComputedStyle(document.querySelector('.chart svg [aria-label=\"y-axis tick label\"]')).fill"
        assert browser.execute_script(ink) == "rgb(230, 233, 236)"
        assert_accessible(browser)
        emulate(browser, dark=True, media="print")
        assert background(browser) == "rgb(255, 255, 255)"
        assert browser.execute_script(ink) == "rgb(29, 35, 41)"
        assert not find(browser, ".compare button").is_displayed()
        emulate(browser, dark=True)
        paper = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
        assert paper.startswith(b"%PDF")
        assert 2 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 40
    finally:
        emulate(browser)


def as_data(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def assert_fits(browser, page):
    """Nothing is wider than a phone, but what scrolls in itself."""
    look_at(browser, page, 375)
    inside, page_width = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inside == 375
    assert page_width <= 375
    wide = browser.execute_script(
        """return [...document.querySelectorAll("main *")].filter(element =>
            !element.closest(".wide, pre, svg") && element.getBoundingClientRect().right > innerWidth + 1
        ).map(element => element.outerHTML.slice(0, 100))"""
    )
    assert wide == []
