"""Does the suite notice a fault? python tests/mutations.py [WORD ...]

Applies one-line faults, one at a time, to a copy of the project, and runs the tests that should notice; every one must
fail. WORD picks the faults whose description holds it. It takes long, so it is run on request, not in CI.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = [  # description, file, what stands there, what takes its place, and the tests, if they are not the file's own
    ("position embedding on one token only", "model", "return tokens + self.position",
     "return tokens + self.position[:, :1]"),
    ("class token added after the position embedding", "model",
     "return tokens + self.position",
     "return torch.cat([tokens[:, :1], tokens[:, 1:] + self.position[:, 1:]], dim=1)"),
    ("softmax over the queries", "model", "softmax(dim=3)", "softmax(dim=2)"),
    ("map handed on refined instead of raw", "model", "return x, raw if self.config.share else refined",
     "return x, refined"),
    ("scale of the shared map missing", "model", "self.scale * self.norm(maps", "self.norm(maps"),
    ("map handed on added without its scale", "model", "raw + self.scale * handed", "raw + handed"),
    ("queries and keys not scaled", "model", "x * self.scale**0.5 for", "x for"),
    ("wrong padding in the stem", "model", "first, 7, stride=2)", "first, 7, stride=2, padding=4)"),
    ("wrong padding on the maps", "model", "expanded, kernel, groups=expanded)",
     "expanded, kernel, groups=expanded, padding='valid')"),
    ("expansion ignored", "model", "config.heads * config.expand, config", "config.heads, config"),
    ("skip around the refinement missing", "model", "self.norm(maps + reduced)", "self.norm(reduced)"),
    ("branch added once instead of twice", "model", "x = x + 2 * self.drop_path(attended)",
     "x = x + self.drop_path(attended)"),
    ("scale of the MLP missing", "model", "self.scale * self.fc2", "self.fc2"),
    ("approximate GELU", "model", "F.gelu(self.fc1(x))", "F.gelu(self.fc1(x), approximate='tanh')"),
    ("box rows and columns swapped", "model", "row0, col0, row1, col1 = box", "col0, row0, col1, row1 = box"),
    ("token logits not swapped back", "model", "swap_tokens(output.token_logits, mix_box)",
     "output.token_logits"),
    ("mean instead of the largest token logit", "model", "self.token_logits.amax(dim=1)",
     "self.token_logits.mean(dim=1)"),
    ("drop path the same in every block", "model", "config.drop_path * index / max(config.depth - 1, 1)",
     "config.drop_path"),
    ("maps of the wrong blocks refined", "model", "index % 2 == 1)", "index % 2 == 0)"),
    ("checksum of a checkpoint not looked at", "foreign", "raise ValueError(f\"{part}", "print(f\"{part}",
     "checkpoint"),
    ("a checkpoint may run code", "foreign", "weights_only=True", "weights_only=False", "checkpoint"),
    ("a file that unpacks to more than it is", "foreign", "if sum(part.file_size for part in file.infolist()) > size:",
     "if False:"),
    ("a tensor larger than its file", "foreign", "if value.numel() * value.element_size() > size:", "if False:"),
    ("sparse and quantized tensors taken", "foreign", "value.layout != torch.strided or value.dtype not in NUMBERS",
     "False"),
    ("a number that is not finite in a schema", "foreign", "and math.isfinite(value)", ""),
    ("a field that is missing", "foreign", "            if name in needed:", "            if False:"),
    ("weights that are not finite", "checkpoint", "    if unfit:", "    if False:", "foreign"),
    ("a model built before its weights are looked at", "checkpoint", "        if faults:\n            raise ValueError",
     "        if False:\n            raise ValueError", "foreign"),
    ("moments of other shapes handed to the optimizer", "engine", "check_alike(there, here, \"its state\")", "pass",
     "foreign"),
    ("moments laid out as on another device", "engine", "torch.empty_like(parameter).copy_(moments[index][name])",
     "moments[index][name]"),
    ("saved at the end of an epoch, before it is evaluated", "engine", " and self.step % self.steps_per_epoch:", ":",
     "train"),
    ("no backup of the checkpoint before", "checkpoint", "if backup and Path(path).exists()", "if False"),
    ("files written in place", "__init__", "path.with_name(f\"{path.name}.{os.getpid()}.tmp\")", "path",
     "checkpoint"),
    ("average ignored when a model is loaded", "checkpoint", "\"ema\": \"ema\", \"raw\": \"model\"",
     "\"raw\": \"model\", \"ema\": \"ema\""),
    ("published averages taken unasked", "checkpoint", "{\"raw\": \"state_dict\", \"ema\": \"state_dict_ema\"}",
     "{\"ema\": \"state_dict_ema\", \"raw\": \"state_dict\"}"),
    ("positions enlarged with antialiasing", "checkpoint", "antialias=grid < side", "antialias=True"),
    ("positions resized with rows for columns", "checkpoint", "permute(0, 3, 1, 2)", "permute(0, 3, 2, 1)"),
    ("misfit weights copied all the same", "checkpoint", "    if faults:\n        raise UserError",
     "    if False:\n        raise UserError"),
    ("crop boxes with x and y swapped", "augment", "torch.cat([matrix, centre[:, :, None]], dim=2)",
     "torch.cat([matrix, centre.flip(1)[:, :, None]], dim=2)"),
    ("flips ignored", "augment", "torch.where(flips, -1.0, 1.0)", "torch.where(flips, 1.0, 1.0)"),
    ("turns of a picture ignore its proportions", "augment", "torch.stack([cos, -sin / aspects, sin * aspects, cos]",
     "torch.stack([cos, -sin, sin, cos]"),
    ("map not flipped with its picture", "augment", "label_map, boxes = flip_map(label_map, boxes, flips)", "pass"),
    ("box not flipped with its map", "augment", "torch.where(flips[:, None], mirrored, boxes)", "boxes"),
    ("map turned the wrong way", "augment", "    matrix = turn_matrix(turns, aspects)\n",
     "    matrix = turn_matrix(-turns, aspects)\n"),
    ("map of a stream not flipped", "augment", "[[-1.0 if flipped else 1.0], [1.0]]", "[[1.0], [1.0]]"),
    ("map of a stream not augmented", "augment", "theta = torch.linalg.inv(to_pixels) @ places @ to_pixels",
     "theta = torch.eye(3).double()"),
    ("map of a stream turned as if square", "augment", "torch.linalg.inv(to_pixels) @ places @ to_pixels",
     "torch.linalg.inv(to_pixels / sides[:, None]) @ places @ (to_pixels / sides[:, None])"),
    ("operations of a stream's map in the wrong order", "augment", "places @ matrix", "matrix @ places"),
    ("one operation of RandAugment always done", "augment", "if torch.rand(()) < self.PROBABILITY:", "if True:"),
    ("levels of RandAugment not cut", "augment", "min(max(level, 0.0), 10.0)", "level"),
    ("magnitude out of 30", "augment", "return argument and argument(level / 10, sign)",
     "return argument and argument(level / 30, sign)"),
    ("RandAugment fills with black", "augment", "fillcolor=(128, 128, 128)", "fillcolor=(0, 0, 0)"),
    ("evaluation's picture rounded up", "augment", "math.floor(size / crop)", "math.ceil(size / crop)"),
    ("a crop made of several random ones", "augment", "(params[side] for side in",
     "(crop.make_params([picture])[side] for side in"),
    ("a bad map left out as a bad picture", "splits", "return _BadMap(error)", "return str(error)"),
    ("validation scenes with training's layouts", "data", "seed=0, stream=\"validation scenes\")",
     "seed=0)", "scenes"),
    ("box of a stream in pixels", "augment", "torch.tensor([picture.width, picture.height] * 2)", "1.0"),
    ("maps of other pictures", "splits", "self.maps.read(here.numpy())", "self.maps.read(here.numpy() * 0)"),
    ("scenes the same in every epoch", "scenes", "seed_for(self.stream, self.seed, epoch)", "self.seed"),
    ("scenes of training and validation of one seed's digits", "data",
     "SceneSplit(*val, 1_000", "SceneSplit(*train, 1_000", "scenes"),
    ("token of a scene read column by column", "scenes",
     "centre.repeat(self.grid), centre.repeat_interleave(self.grid)",
     "centre.repeat_interleave(self.grid), centre.repeat(self.grid)"),
    ("digits of a scene overlap", "scenes", "apart.any(dim=3).all(dim=2)", "apart.any(dim=3).any(dim=2)"),
    ("label map cropped along the wrong axis", "relabel", "x1, y1, x2, y2 = boxes",
     "y1, x1, y2, x2 = boxes"),
    ("label map pooled without aligning", "relabel", "roi_align(dense, rois, size, aligned=True)",
     "roi_align(dense, rois, size, aligned=False)"),
    ("softmax before the pooling", "relabel", "    index = torch.arange(batch", "    dense = dense.softmax(1)\n"
     "    index = torch.arange(batch"),
    ("tokens of a label map column by column", "relabel", "rois, size, aligned=True).flatten(2)",
     "rois, size, aligned=True).transpose(2, 3).flatten(2)"),
    ("box of MixToken one too large", "relabel", "min(row + half, grid), min(col + half, grid)",
     "min(row + half + 1, grid), min(col + half, grid)"),
    ("box of MixToken not floored", "relabel", "int(grid * (1 - lam) ** 0.5) // 2",
     "round(grid * (1 - lam) ** 0.5 / 2)"),
    ("share of the box inverted", "relabel", "return (row1 - row0) * (col1 - col0) / grid**2",
     "return 1 - (row1 - row0) * (col1 - col0) / grid**2"),
    ("cutmix mixes token labels by area", "relabel", "tokens = torch.where(pasted, tokens.flip(0), tokens)",
     "tokens = (1 - share) * tokens + share * tokens.flip(0)"),
    ("cutmix takes a token's corner for its centre", "relabel", "device=tokens.device) + 0.5) * size",
     "device=tokens.device) + 0.0) * size"),
    ("mixup with the share of the partner", "relabel", "lam * tensor + (1 - lam) * tensor.flip(0)",
     "(1 - lam) * tensor + lam * tensor.flip(0)"),
    ("class label not mixed by MixToken", "relabel", "        if share:", "        if False:"),
    ("dense weight ignored", "relabel", "loss + self.dense_weight * (losses", "loss + (losses"),
    ("tokens without a label trained", "relabel", "(losses * labelled).sum()", "losses.sum()"),
    ("an id outside the classes taken", "label_store", "    if outside.any():", "    if False:"),
    ("a store that lost its end taken", "label_store", "if size < expected or", "if False or"),
    ("a store with more than it speaks of taken", "label_store", "whole and size > expected", "False"),
    ("maps read with another one's shape", "label_store", "if (logits[:, 1:] > logits[:, :-1]).any():", "if False:"),
    ("pictures without a map taken", "label_store", "    if not all(found):", "    if False:"),
    ("an incomplete store taken", "label_store", "if facts[\"done\"] < len(names):", "if False:"),
    ("a store of other classes taken", "label_store", "if facts[\"classes\"] != classes:", "if False:"),
    ("published maps may run code", "foreign", "map_location=map_location, weights_only=True",
     "map_location=map_location, weights_only=False", "label_store"),
    ("annotated pictures cropped, not squashed", "annotate", "squash(read_picture(self.paths[index]), self.size)",
     "squash(read_picture(self.paths[index]).crop((0, 0, 30, 30)), self.size)"),
    ("logits not shifted", "annotate", "(values - shift).permute", "values.permute"),
    ("classes in another order", "annotate", "wnids.index(name) for name in classes",
     "wnids.index(name) for name in sorted(classes, reverse=True)"),
    ("resumed one row early", "label_store", "file.seek(self.facts[\"done\"] * 2",
     "file.seek((self.facts[\"done\"] - 1) * 2", "annotate"),
    ("a begun store written over", "label_store", "if differing or not resume:", "if False:", "annotate"),
    ("pictures of an annotator not normalised", "annotate", "(pictures - self.mean) / self.deviation",
     "pictures / self.deviation"),
    ("left-out pictures not noted", "label_store", "self.facts[\"skipped\"] += skipped", "pass", "annotate"),
    ("proportions of the picture ignored", "augment", "    shape = shape / aspects[:, None]",
     "    shape = shape / 1.0"),
    ("the first of ten boxes taken, fit or not", "augment", "first = fits.int().argmax(dim=1)[:, None, None]",
     "first = 0 * fits.int().argmax(dim=1)[:, None, None]"),
    ("one box for the whole batch", "augment", "return torch.cat([corner, corner + sides], dim=1)",
     "return torch.cat([corner, corner + sides], dim=1)[:1].repeat(len(aspects), 1)"),
    ("erasing without a probability", "augment", "(torch.rand(len(images), 1, device=images.device) < probability)",
     "1"),
    ("stale cache used", "splits", "if right and stored[\"key\"] == key else None", "if right else None"),
    ("a replaced picture not noticed", "splits", "{found.st_size} {found.st_mtime_ns}", "{found.st_size}"),
    ("a flipped byte in the cache trained on", "splits", "if file.testzip():", "if False:"),
    ("a cache of another shape used", "splits", "return split if right and", "return split if"),
    ("16 bits cut off, not scaled", "pictures", "picture = _in_eight_bits(picture)", "pass"),
    ("a pipe waited for", "pictures", "if not Path(source).is_file():", "if not os.path.lexists(source):"),
    ("a disk that does not answer is waited for", "splits", "timeout=WAIT if workers else 0", "timeout=0"),
    ("a folder read twice by a link", "data", "if twin != path:", "if False:"),
    ("a stream repeats itself every epoch", "splits", "self.seed, epoch, index)", "self.seed, index)"),
    ("bad pictures left out unasked", "splits", "if not self.skip_bad:", "if False:"),
    ("digits split by position, not by class", "data", "rank_in_class % 5 == 4\n",
     "torch.arange(len(labels)) % 5 == 4\n"),
    ("held-out pictures trained on too", "data", "if out is wanted]", "if out or not wanted]"),
    ("held out by position, not by class", "data", "held[mine[(", "held[torch.arange(len(labels))[("),
    ("a pair's map refined where sharing alone is asked for", "model", "config.refine and not config.unrefined and (",
     "config.refine and ("),
    ("heads compared with themselves", "measures", "- n) / (n * (n - 1))", ") / (n * n)"),
    ("entropy not over its largest", "measures", ".mean() / math.log(maps.shape[3])", ".mean()"),
    ("CKA of layers that are not centred", "measures", " - torch.outer(self.total, self.total) / self.count", ""),
    ("the class token counted among the patches", "measures", "weights(maps[:, :, 1:, 1:])",
     "weights(maps[:, :, :-1, :-1])"),
    ("a branch that is switched off leaves nothing of its mean", "measures", "+ reduce[1].bias[:, None, None]", ""),
    ("a copy that is not shifted", "measures", "return mean + slope", "return slope"),
    ("a hook left on the model", "measures", "handle.remove()", "pass"),
    ("a study that begins a run anew", "study", 'return ["--resume", str(self.out)', 'return ["--out", str(self.out)'),
    ("a record written over by a repeated run", "study", "    if run.record.exists():\n        before",
     "    if False:\n        before"),
    ("differences not paired by seed", "report", "for seed in one if seed in other]", "for seed in (0,)]"),
    ("a deviation said to be the standard error", "report", "/ len(found) ** 0.5 if", "if"),
    ("a difference within two standard errors printed bold", "report", "abs(value) > 2 * error", "abs(value) > error"),
    ("the answer is the symbol that is shown", "neighbour", "row.gather(1, shown + away)[:, 0]",
     "row.gather(1, shown)[:, 0]"),
    ("a row is never finished with, but begun again", "neighbour", "if tuple(map(str, (*wanted, seed))) in done:",
     "if False:"),
    ("testing draws from the chance of training", "neighbour", "with torch.random.fork_rng(devices=[]):", "if True:"),
    ("a second SIGTERM ends at once", "stopping", "number == signal.SIGINT and self.signal", "self.signal"),
    ("a Ctrl-C that is handed on ends at once", "stopping", " and now - self.noted > AGAIN", ""),
    ("the clock runs on after a save", "stopping", "self.last = time.monotonic()",
     "self.last = getattr(self, 'last', 0.0)"),
    ("two runs in one folder", "stopping", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    ("a save on the way forgets the loss so far", "engine", "                self.count_up()\n",
     "                self.loss.total.zero_()\n", "train"),
    ("never saved on the way", "engine", "if clock.due(self.step) and", "if False and", "train"),
    ("a restart begins anew", "train", "if begun(folder_of(args)) else None", "if False else None"),
    ("a stopped run recorded", "study", "        if status := train_to_the_end(run):\n            return status",
     "        train_to_the_end(run)"),
    ("EMA never updated", "engine", "        self.update_average()", "        pass"),
    ("EMA decays the wrong way round", "engine", "get_ema_multi_avg_fn(decay)", "get_ema_multi_avg_fn(1 - decay)"),
    ("warm-up starting at full rate", "recipes", "return first + (1 - first) * epoch / recipe.warmup_epochs",
     "return 1.0"),
    ("cosine from the end of the warm-up", "recipes", "math.cos(math.pi * epoch / end)",
     "math.cos(math.pi * (epoch - recipe.warmup_epochs) / (end - recipe.warmup_epochs))"),
    ("the average's decay not scaled with the batch", "recipes", "preset.ema**larger", "preset.ema"),
    ("crop of the published models forgotten", "recipes", "\"eval_crop\": crop}", "\"eval_crop\": 0.9}"),
    ("no cool-down", "recipes", "end = recipe.epochs - recipe.cooldown_epochs", "end = recipe.epochs"),
    ("labels not mixed with the pictures", "engine", "images, labels = self.mix(batch.pictures, self.labels(batch))",
     "images, labels = self.mix(batch.pictures, self.labels(batch))[0], self.labels(batch)"),
    ("erasing left out", "engine", "erase(images, self.recipe.erasing) if self.recipe.erasing else images", "images"),
    ("a step that was left out moves the average", "engine", "        if self.update_weights():",
     "        if self.update_weights() or True:"),
    ("gradients clipped before they are unscaled", "engine", "            self.scaler.unscale_(self.optimizer)\n",
     ""),
    ("labels of the maps not learnt from", "engine", "        if batch.label_map is not None:", "        if False:"),
    ("MixToken's share kept from the loss", "engine", "0.0 if box is None else box_share(box, grid)", "0.0"),
    ("the maps' annotator forgotten", "train", "\"annotator\", \"storage\")", "\"storage\")"),
    ("a run of another recipe gone on with", "train", "if state.get(\"recipe_version\") != VERSION:", "if False:"),
    ("turning asked of a stream", "train", "            if value > none:", "            if False:"),
    ("token labels learnt from unasked", "engine", "wanted = self.recipe.token_labels and",
     "wanted ="),
    ("an exercise's answer may change what it is compared with", "exercises", "value.clone() if", "value if"),
    ("a wrong answer of which no sentence speaks is taken", "exercises",
     "    raise WrongAnswer(f\"its numbers", "    print(f\"its numbers"),
    ("a solution takes the place of an answer", "exercises", "if steps(stub) == steps(empty)", "if True"),
    ("colours of few classes by their number", "plots", "if len(order) > len(CATEGORIES):", "if True:"),
    ("points of RoIAlign at the squares' edges", "plots", "(index + 0.5) / count for", "index / count for"),
    ("accuracy of tokens without a label counted", "evaluation", "(right & labelled).sum()", "right.sum()"),
    ("evaluation with TF32", "evaluation", "with hardware.exact_float32():", "if True:"),
    ("weight decay on every parameter", "engine", "(rest if keep else decay)", "decay"),
    ("resume forgetting the random state", "engine",
     "torch.manual_seed(seed_for(\"step\", self.recipe.seed, self.step, self.rank))", "pass", "train"),
    ("resume forgetting the optimizer", "engine",
     "self.optimizer.load_state_dict(self.optimizer.state_dict() | {\"state\": moments})", "pass", "train"),
    ("resume forgetting the loss of the epoch", "engine", "self.loss.total.copy_(state[\"loss\"])", "pass", "train"),
    ("resume from the start of the epoch", "engine", "self.order(epoch)[start * self.local_batch:]",
     "self.order(epoch)", "train"),
    ("the same order every epoch", "engine", "seed_for(\"order\", self.recipe.seed, epoch)", "self.recipe.seed"),
    ("evaluation in training mode", "evaluation", "net.eval(), split.to(device)", "net.train(), split.to(device)"),
    ("raw weights kept as the best", "engine", "run.best_model.state_dict()", "run.model.state_dict()", "train"),
    ("numbers above their range, or none, taken", "recipes", "not low <= value <= high:", "value < low:"),
    ("mixing of which no draw is defined", "recipes", "0 < value < above", "False"),
    ("a device that holds no data", "hardware", "torch.ones(1, device=device).item()", "torch.ones(1, device=device)"),
    ("a recipe of another model than the file's", "recipes", "    if differing:", "    if False:", "foreign"),
    ("Ctrl-C while torch is imported is a traceback", "__init__", "sys.excepthook = _interrupted", "pass"),
    ("more processes than pictures to validate", "train", "    if count > len(subset.val):", "    if False:"),
    ("a full disk told by what torch says of it", "__init__", "for one in (error, error.__context__)",
     "for one in (error,)", "checkpoint"),
    ("pictures that are read by running a program", "pictures", "Image.open(source, formats=FORMATS)",
     "Image.open(source)"),
    ("answers that are not finite presented", "train", "if not math.isfinite(score.loss):", "if False:", "foreign"),
    ("learning rate not scaled with the batch", "recipes", "preset.lr * larger", "preset.lr"),
    ("a loss that is not finite goes on", "engine", "        if bad < math.inf:", "        if False:"),
    ("several processes evaluate with several statistics", "distributed", "dist.broadcast(tensor, 0)", "pass"),
    ("another run overwritten", "train", "    if held:", "    if False:"),
    ("label smoothing ignored", "relabel", "label_smoothing=self.smoothing)", "label_smoothing=0.0)"),
    ("attention to the class token shown for attention of it", "explain", "maps[0, :, 0, 1:]", "maps[0, :, 1:, 0]"),
    ("streams of chance are one", "__init__", "spawn_key=tuple(stream.encode())", "spawn_key=()"),
    ("evaluation opens the training pictures too", "data", "(\"val\",) if only_val else (\"train\", \"val\")",
     "(\"train\", \"val\")", "train"),
    ("validation keeps its workers", "data", "keep_workers=name == \"train\"", "keep_workers=True", "splits"),
    ("a stream is moved in place", "splits", "there = copy(self)", "there = self"),
    ("workers for all of the machine's cores", "hardware", "return len(os.sched_getaffinity(0))",
     "return os.cpu_count()"),
    ("the first of equally good epochs", "records", "key=lambda row: (row[\"val_accuracy\"], row[\"epoch\"])",
     "key=lambda row: row[\"val_accuracy\"]"),
    ("copies of a corner", "prepare", "functional.center_crop(picture, [min(picture.size)])",
     "picture.crop((0, 0, *[min(picture.size)] * 2))"),
    ("copies with other settings mixed", "prepare", "        if differing:", "        if False:"),
    ("pictures sorted by a list that lacks some", "prepare", "there.keys() - classes.keys()", "set()"),
    ("training and validation loss mixed up", "plots", "row[\"val_loss\"] for row", "row[\"train_loss\"] for row"),
]
FAULTS += [  # the notebooks show all of model.py: they must notice that theirs is another one
    (f"{description}, in model.py and not in the notebooks", file, there, instead, "notebooks")
    for description, file, there, instead, *_ in FAULTS if file == "model"]
TESTS = {"__init__": "init"}  # the tests of a module that are named otherwise


def run_tests(file: str, there: str = "", instead: str = "", tests: str = "") -> subprocess.CompletedProcess:
    """Run a module's tests, or others, in a copy of the project in which instead has taken the place of there."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        made = {ROOT / name for name in ("build", "runs", "labels", "data")}  # and not tests/data
        shutil.copytree(ROOT, project, ignore=lambda folder, names: [
            name for name in names if name.startswith(".") or name == "__pycache__" or Path(folder, name) in made])
        if there:
            path = project / "refiner_min" / f"{file}.py"
            path.write_text(path.read_text().replace(there, instead))
        suite = f"tests/test_{tests or TESTS.get(file, file)}.py"
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", suite]
        environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=project, capture_output=True, text=True, env=environment)


def astray() -> list[str]:
    """The faults whose text is not there exactly once, as sentences; a test keeps this list empty."""
    counts = [(ROOT / "refiner_min" / f"{file}.py").read_text().count(there) for _, file, there, *_ in FAULTS]
    return [f"{file}.py holds {there!r} {count} times: mend the fault «{description}»"
            for (description, file, there, *_), count in zip(FAULTS, counts) if count != 1]


def main(words: list[str]) -> int:
    faults = [fault for fault in FAULTS if not words or any(word in fault[0] for word in words)]
    if astray():
        print("\n".join(astray()))
        return 1
    missed = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        suites = sorted({"".join(tests) or file for _, file, _, _, *tests in faults})
        for suite, done in zip(suites, pool.map(run_tests, suites)):
            if done.returncode:
                print(f"the tests of {suite} fail without any fault:\n{done.stdout[-3000:]}")
                return 1
        results = pool.map(lambda fault: run_tests(*fault[1:]), faults)
        for number, ((description, *_), done) in enumerate(zip(faults, results), 1):
            first = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            print(f"{number:2}/{len(faults)} {'caught' if done.returncode else 'MISSED'}: {description}"
                  f"{f'  ({first[0][:90]})' if first else ''}", flush=True)
            if done.returncode == 0:
                missed.append(description)
    print(f"{len(faults) - len(missed)} of {len(faults)} faults caught" + (f"; missed: {missed}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
