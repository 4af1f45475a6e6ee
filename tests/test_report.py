"""report.py: the statistics against their formulas, and the written page against the records."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch

from refiner_min import plots, report, study

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "notebooks" / "results"


def record(accuracy: float, seed: int = 0, **result) -> dict:
    measured = {"head_similarity": [0.5, 0.7], "head_similarity_centred": [0.1, 0.2],
                "token_similarity": [0.1, 0.2, 0.3],
                "entropy": [0.9, 0.8], "distance": [4.0, 3.0], "cka": [[1.0, 0.5, 0.5]] * 3, "same": [None, 0.25],
                "branch_share": [None, 0.75], "kept_convolve": [None, 0.5], "accuracy_without_branch": 0.25,
                "accuracy_with_copies": None}
    return {"result": {"accuracy": accuracy, **result}, "measures": measured, "parameters": 1234, "commit": "c" * 40,
            "hardware": "a machine", "command": f"python -m refiner_min.train --depth 12 --seed {seed} --out here",
            "recipe": {"seed": seed, "batch_size": 10, "epochs": 6}, "pictures": {"train": 1009},
            "curve": [0.1, accuracy], "epochs": [5, 10]}


def runs(*accuracies: float) -> dict[int, dict]:
    return {seed: record(accuracy, seed) for seed, accuracy in enumerate(accuracies)}


def test_a_difference_is_paired_by_seed_with_its_standard_error():
    found = report.difference(runs(0.62, 0.65, 0.69), runs(0.60, 0.64, 0.66))
    assert found == (pytest.approx(2.0), pytest.approx(statistics.stdev([2, 1, 3]) / 3**0.5), 3)
    assert report.difference(runs(0.62, 0.65), {1: record(0.6, 1)}) == (pytest.approx(5.0), None, 1)
    assert report.difference(runs(0.62), {1: record(0.6, 1)}) is None


def test_a_difference_is_bold_outside_the_interval_of_so_few_seeds():
    """Not by two standard errors alone, of which those of two or three seeds are worth little."""
    for said, *found in (("**-2.0 ± 0.4**", -2.0, 0.4, 3), ("+2.0 ± 0.5", 2.0, 0.5, 3), ("-0.2 ± 0.0", -0.2, 0.02, 2),
                         ("**-0.3 ± 0.0**", -0.3, 0.02, 2), ("**+2.0 ± 0.7**", 2.0, 0.7, 5), ("-0.5", -0.5, None, 1)):
        assert report.said(report.Difference(*found)) == said
    assert report.said(None) == "-"
    for seeds, times in report.STUDENT.items():  # of Student's density, the middle 95 %
        degrees, places = seeds - 1, torch.linspace(-times, times, 100001, dtype=torch.float64)
        density = math.gamma(seeds / 2) / math.gamma(degrees / 2) / (math.pi * degrees) ** 0.5
        inside = torch.trapezoid(density * (1 + places**2 / degrees) ** (-seeds / 2), places)
        assert inside == pytest.approx(0.95, abs=3e-4)


def test_measures_of_signed_maps_are_kept_apart():
    """Entropy and distance are of blocks whose map is not refined; correlations of either sign do not cancel."""
    measured = {"entropy": [0.2, 0.9, 0.4, 0.9], "distance": [1, 9, 2, 9], "same": [None, 0.5, None, -0.3]}
    found = {name: report.MEASURES[name](measured) for name in ("entropy", "distance", "same map", "gain")}
    assert found == {"entropy": pytest.approx(0.3), "distance": 1.5, "same map": pytest.approx(0.4), "gain": None}
    assert report.MEASURES["entropy"]({"entropy": [0.2, 0.4]}) == pytest.approx(0.3)
    assert report.MEASURES["entropy"]({"entropy": [0.2, 0.4], "same": [0.1, 0.2]}) is None


def test_minutes_are_those_of_all_epochs_at_the_measured_speed():
    assert report.minutes(record(0.5), 50) == 6 * 1000 / 50 / 60  # the incomplete last batch is left out


def test_the_page_holds_what_is_recorded():
    records = {"imagenette-depth12-plain": runs(0.60, 0.62), "imagenette-depth12-refined": runs(0.70, 0.72),
               "imagenette-depth12-deeper": runs(0.61)}
    text = report.text(records, {"hardware": "two cores", "commit": "abcdefgh", "images_per_second": {
        "imagenette-depth12-plain": 50.0}})
    assert "nothing beside it (two cores, commit abcdefg)" in text and "## Digit scenes" not in text
    assert "| plain | 2 | 1,234 | 61.0 ± 1.4 % | - | +0.0 | 50 | 2.0 |" not in text  # against deeper: seed 0 alone
    assert "| plain | 2 | 1,234 | 61.0 ± 1.4 % | - | -1.0 | 50 | 2.0 |" in text
    assert "| deeper | 1 | 1,234 | 61.0 % | +1.0 | - | - | - |" in text
    assert "| refined | 2 | 1,234 | 71.0 ± 1.4 % | **+10.0 ± 0.0** | +9.0 | - | - |" in text
    assert ("| refined | 0.600 | 0.150 | 0.300 | 0.900 | 4.000 | 0.250 | - | 0.750 | 0.500 | 25.0 ± 0.0 % | - | - |"
            in text)
    assert "Commit ccccccc; a machine:" in text
    assert ("- `imagenette-depth12-refined`: `python -m refiner_min.train --depth 12`, seeds "
            "[0](imagenette-depth12-refined-seed0.json), [1](imagenette-depth12-refined-seed1.json)") in text
    figures = report.pictures(records)
    assert figures.keys() == {"study-depth12.png", "study-depth12-why.png"}
    assert list(figures["study-depth12.png"].axes[0].lines[0].get_xdata()) == [5, 10]  # when they were validated
    assert "## Token labels" not in report.text({"imagenette-depth6-refined": runs(0.7)}, {"images_per_second": {}})
    assert "not made yet" in report.text(records, report.load_speed(Path("nowhere")))
    records["imagenette-depth12-refined"][0]["commit"] = None  # there was no repository
    assert "Commit ccccccc, unknown; a machine:" in report.text(records, {
        "hardware": "two cores", "commit": None, "images_per_second": {}})
    tokens = {"scenes-plain": {0: record(0.5, token_accuracy=0.25)}, "scenes-refined": runs(0.5)}
    text = report.text(tokens, {"images_per_second": {}})
    assert "| plain | 1 | 1,234 | 50.0 % | 25.0 % | - | - | - |" in text
    assert "| refined | 1 | 1,234 | 50.0 % | - | +0.0 | - | - |" in text


def test_rows_of_another_table_are_compared_with():
    """Which are of another commit; a seed that only one of the two has does not count."""
    records = {"imagenette-depth6-plain": runs(0.60), "imagenette-depth6-normalised": runs(0.63, 0.65)}
    lines = report.pictures(records)["study-normalised.png"].axes[0].lines
    assert [line.get_label() for line in lines] == ["normalised", "plain"]
    text = report.text(records, {"images_per_second": {}})
    assert "| model | seeds | parameters | accuracy | to plain | img/s | minutes |" in text
    assert "| normalised | 2 | 1,234 | 64.0 ± 1.4 % | +3.0 | - | - |" in text
    assert "Commit ccccccc; a machine; plain: above:" in text


def test_the_table_of_the_neighbours():
    def made(variant, blocks, steps, seed, accuracy, reached=""):
        return {"task": "right", "variant": variant, "blocks": str(blocks), "steps": str(steps), "seed": str(seed),
                "accuracy": str(accuracy), "steps_to_99": str(reached)}

    text = report.text({}, {"images_per_second": {}}, [
        made("plain", 1, 300, 0, 0.06), made("plain", 1, 300, 1, 0.08), made("plain", 2, 3000, 0, 0.99, 500),
        made("plain", 2, 3000, 1, 0.99, 700), made("plain", 2, 3000, 2, 0.5), made("refined", 1, 300, 0, 1.0),
        made("refined", 2, 3000, 0, 0.9), made("faint-places", 2, 3000, 0, 0.1), made("linear", 1, 300, 0, 1.0)])
    assert "| model | right, 300 steps | steps to 99 %, 2 blocks |" in text
    assert "| plain | 7.0 ± 1.4 % | 600 (2 of 3) |" in text and "| refined | 100.0 % | - (0 of 1) |" in text
    assert "| faint-places | - | - (0 of 1) |" in text and "| linear | 100.0 % | - |" in text


def test_every_experiment_is_in_a_table_and_every_table_of_experiments():
    known = {experiment.name for group in study.GROUPS for experiment in group.experiments} - {"neighbour"}
    assert {name for table in report.TABLES for name in table.rows.values()} == known
    assert all(label in table.rows for table in report.TABLES for label in table.against)
    assert all(name in known for table in report.TABLES for name in table.beside.values())
    colours = len(plots.SERIES)  # of a table's picture
    assert all(len(table.rows) + len(table.beside) <= colours for table in report.TABLES)


def test_the_written_page_is_that_of_the_records():
    assert (RESULTS / "study.md").read_text() == report.text(
        report.load(RESULTS), report.load_speed(RESULTS), report.load_neighbours(RESULTS))
    figures = report.pictures(report.load(RESULTS))
    assert {path.name for path in RESULTS.glob("study-*.png")} == figures.keys()
    assert set(re.findall(r"!\[\]\((.+?)\)", (RESULTS / "study.md").read_text())) == figures.keys()


def test_the_rows_of_a_table_are_of_one_commit_one_recipe_and_one_number_format():
    records = report.load(RESULTS)
    for table in report.TABLES:
        rows = [run for name in table.rows.values() for run in records.get(name, {}).values()]
        commits = {part["commit"] for run in rows for part in (run, *run.get("resumed", []))}
        assert len(commits) <= 1 and all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits), table.title
        assert len({run["hardware"] for run in rows}) <= 1, table.title
        for field in ("epochs", "batch_size", "lr", "img_size", "amp", "subset"):
            assert len({json.dumps(run["recipe"].get(field, run["subset"])) for run in rows}) <= 1, table.title


def after(epoch: int, runs: dict[int, dict]) -> dict[int, dict]:
    """The records as if they had ended after that epoch."""
    return {seed: {"result": {"accuracy": run["curve"][run["epochs"].index(epoch)]}} for seed, run in runs.items()}


def test_what_is_said_of_the_parts_is_recorded():
    """In the first README and in notebook 5; normalised is of another commit, between which training is the same."""
    def said(one, other, depth=6) -> str:
        return str(report.difference(*(records[f"imagenette-depth{depth}-{label}"] for label in (one, other))))

    records = report.load(RESULTS)
    readme, text = ((ROOT / path).read_text() for path in ("README.md", "notebooks/05_full_training.ipynb"))
    labels = ("plain", "deeper", "refined", "expansion", "convolution", "sharing", "normalised")
    kinds = [f"depth{depth}-{label}" for depth in (6, 12) for label in labels] + ["depth6-small-branch"]
    assert all(records[f"imagenette-{kind}"].keys() == {0, 1, 2} for kind in kinds)
    summary = (
        f"± standard error (12 epochs, 3 seeds, paired): with 12 blocks {said('refined', 'plain', 12)} (at equal "
        f"time {said('refined', 'deeper', 12)}), without expansion {said('convolution', 'plain', 12)}, without "
        f"convolution {said('expansion', 'plain', 12)}, no branch before its BatchNorm "
        f"{said('normalised', 'plain', 12)}; with 6 blocks "
        f"{said('refined', 'plain')} (at equal time {said('refined', 'deeper')}; 50 epochs, one seed: "
        f"{report.difference(records['headline-refined'], records['headline-plain'])}), no branch "
        f"{said('normalised', 'plain')}. Outside two standard errors: {said('normalised', 'plain')[:4]} and, at equal "
        "depth, all with 12.")
    assert summary in " ".join(readme.split())
    for sentence in (
        f"`normalised` stands at {said('normalised', 'plain', 12)} points from the plain ViT, and at "
        f"{said('normalised', 'refined', 12)} from the refiner as published,",
        f"shared as it is comes to {said('sharing', 'plain', 12)}, a deeper plain ViT to "
        f"{said('deeper', 'plain', 12)}, the refiner itself to {said('refined', 'plain', 12)}.",
        f"Expansion comes to {said('expansion', 'plain', 12)}, convolution to "
        f"{said('convolution', 'plain', 12)}. Both",
        f"`normalised` (by {said('normalised', 'expansion', 12)[1:]} and {said('normalised', 'convolution', 12)[1:]}, ",
        f"the refiner is {said('refined', 'expansion', 12)} from expansion (outside two standard errors) and "
        f"{said('refined', 'convolution', 12)} from convolution.",
        f"`normalised` at {said('normalised', 'plain')}, the refiner at {said('refined', 'plain')}, and "
        f"{said('normalised', 'refined')} between them.",
        f"Expansion comes to {said('expansion', 'plain')}, convolution to "
        f"{said('convolution', 'plain')}, and a branch with both that begins as small as trained maps are, to "
        f"{said('small-branch', 'plain')}.",
        f"At equal time the refiner stands at {said('refined', 'deeper')} with six blocks and at "
        f"{said('refined', 'deeper', 12)} with twelve.",
        f"they do with twelve: {said('normalised', 'deeper', 12)}, outside the 95 % interval.",
    ):
        assert sentence in text


def test_what_is_concluded_of_the_parts_follows():
    """From the records, as notebook 5 says it."""
    def difference(one, other, depth=6) -> report.Difference:
        return report.difference(*(records[f"imagenette-depth{depth}-{label}"] for label in (one, other)))

    records = report.load(RESULTS)
    for one, other, depth, errors in (  # outside two standard errors, and outside the 95 % interval
        ("refined", "plain", 12, (True, True)), ("normalised", "plain", 12, (True, True)),
        ("normalised", "refined", 12, (True, True)), ("normalised", "sharing", 12, (True, True)),
        ("refined", "deeper", 12, (False, False)), ("refined", "plain", 6, (False, False)),
        ("refined", "deeper", 6, (False, False)), ("normalised", "plain", 6, (True, False)),
        ("normalised", "refined", 6, (True, False)), ("expansion", "plain", 12, (True, True)),
        ("convolution", "plain", 12, (True, True)), ("normalised", "expansion", 12, (True, False)),
        ("normalised", "convolution", 12, (True, True)), ("refined", "expansion", 12, (True, False)),
        ("refined", "convolution", 12, (False, False)), ("expansion", "convolution", 12, (True, False)),
        ("normalised", "deeper", 12, (True, True)),
    ):
        found = difference(one, other, depth)
        assert (abs(found.points) > 2 * found.error, found.outside()) == errors, (one, other, depth)
    found = difference("refined", "plain")
    text = (ROOT / "notebooks/05_full_training.ipynb").read_text()
    assert f"has a deviation of {found.error * 3**0.5:.1f} points over three seeds" in text
    for label, epochs in (("normalised", (4, 8, 12)), ("refined", range(2, 8))):  # the leads that shrink
        leads = [report.difference(*(after(epoch, records[f"imagenette-depth12-{one}"])
                                     for one in (label, "plain"))).points for epoch in epochs]
        assert leads == sorted(leads, reverse=True)
    sizes = {label: [size for run in records[f"imagenette-depth12-{label}"].values()
                     for size in report.known(run["measures"]["map_deviation"][first:])]
             for label, first in (("refined", 0), ("every-block", 1))}
    pairs, every = (f"{min(found):.2f} to {max(found):.2f}" for found in sizes.values())
    assert "imagenette-depth12-every-block-small" not in records and "which begins with a seventh, will say" in text
    alone = difference("every-block", "plain", 12)
    assert records["imagenette-depth12-every-block"].keys() == {0, 1, 2} and alone.outside()
    assert f"Twelve such blocks stand at {alone} points (outside the 95 % interval of three seeds)." in text
    assert f"have a deviation of {every} from the second block on, in the pairs {pairs}." in text
    gains = {name: [gain for run in records[f"imagenette-{name}"].values()
                    for gain in report.known(run["measures"]["gain"])]
             for name in ("depth6-normalised", "depth12-normalised", "depth6-refined")}
    six, twelve, published = ((min(found), max(found)) for found in gains.values())
    assert f"by {six[0]:.0f} to {six[1]:.0f} with six blocks and by {twelve[0]:.0f} to {twelve[1]:.0f} with" in text
    assert f"is found {published[0]:.1f} to {published[1]:.1f} times" in text
    speed = report.load_speed(RESULTS)["images_per_second"]
    deeper, refined = ([speed[f"imagenette-depth{depth}-{label}"] for depth in (6, 12)]
                       for label in ("deeper", "refined"))
    assert all(0.9 < one / other < 1.1 for one, other in zip(refined, deeper))  # or deeper needs other depths
    assert (f"eight for six ({deeper[0]:.0f} and {refined[0]:.0f} pictures a second on two cores with nothing beside "
            f"them, in float32), seventeen for twelve ({deeper[1]:.0f} and {refined[1]:.0f}).") in text
    refined = records["imagenette-depth6-refined"].values()
    accuracy = statistics.mean(run["result"]["accuracy"] for run in refined)
    minutes = statistics.median(run["result"]["training_minutes"] for run in refined)
    assert f"{minutes:.0f} minutes of training, {100 * accuracy:.0f} % (three seeds" in text


def test_what_is_said_of_token_labels_is_recorded():
    """In notebook 5. Rows of one seed have no standard error yet."""
    records = report.load(RESULTS)
    plain, refined = (records[f"imagenette-depth6-{label}"] for label in ("plain", "refined"))
    picture, maps, mixed = (records[f"imagenette-tokens-{label}"] for label in ("picture", "maps", "mixtoken"))
    assert [len(runs) for runs in (plain, refined, picture, maps, mixed)] == [3, 3, 2, 1, 1]
    text = (ROOT / "notebooks/05_full_training.ipynb").read_text()
    found = report.difference(plain, refined)
    assert (f"plain ViT is ahead of the refiner by {found.points:.1f} ± {found.error:.1f} points: within two standard "
            f"errors") in text and 0 < found.points < 2 * found.error
    found = report.difference(picture, refined)
    assert f"the refiner is: {found.points:.1f} ± {found.error:.1f} points from it, with the two seeds" in text
    assert report.difference({0: picture[0]}, refined).points < 0 < report.difference({1: picture[1]}, refined).points
    assert (f"maps are {report.difference(maps, refined).points:.1f} points above the refiner of the same seed, and "
            f"MixToken with them {-report.difference(mixed, refined).points:.1f} below.") in text
    assert f"the maps are {report.difference(maps, picture).points:.1f} points above it." in text


def test_hardly_any_map_is_left_at_the_published_skip():
    """As notebook 3 says: its text stands beside the formula."""
    shares, recipes = ([share for name, runs in report.load(RESULTS).items() if re.search(pattern, name)
                        for run in runs.values() for share in report.known(run["measures"]["branch_share"])]
                       for pattern in ("-refined$", "^recipe-"))
    assert len(shares) >= 3 * 3 and min(shares) > 0.999
    assert round(1000 * (1 - min(recipes))) == 1  # in thousandths
