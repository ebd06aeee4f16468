"""What both image programs can do beside one plain run: sweeps, several numbers of images, dry runs, weights from one
task; and the program `imagenet`."""

import csv
import json
import signal
import tempfile
import threading
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file
from support.image_tasks import make_suite
from support.nets import SmallNet

from cts_fast.data import suite
from cts_fast.data.download import Archive
from cts_fast.examples import compare, imagenet, resnet20
from cts_fast.experiments import plots

NET = ["--model", "support.nets:SmallNet"]
SMALL = ["--suite", "tiny", *NET, "--rounds", "2", "--test-steps", "2", "--test-seeds", "2", "--points", "2"]


def run(out, *arguments, program=resnet20):
    return program.main([*SMALL, "--out", str(out), *arguments])


def results(out):
    return json.loads((out / "results.json").read_text())


def refused(capsys, out, *arguments, program=resnet20):
    """What the program says when it ends with status 2."""
    with pytest.raises(SystemExit) as end:
        run(out, *arguments, program=program)
    message = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in message
    return message


# Several horizons

SWEEP = ["--horizon", "4,1", "--methods", "cts,finetune", "--images", "20,8"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suite.SUITES, "tiny", make_suite)
        assert run(out, *SWEEP) == 0
    return out


def test_every_horizon_gets_the_same_steps_in_a_folder_of_its_own(swept):
    of_all = results(swept)
    assert list(of_all["horizons"]) == ["4", "1"]
    for horizon, rounds in ((4, 2), (1, 8)):
        own = results(swept / f"horizon-{horizon}")
        train = own["config"]["meta_train"]
        assert (train["horizon"], train["rounds"], train["steps"]) == (horizon, rounds, 8)
        assert own["meta_train"]["cts"]["steps"][-1] == 8
        for part in ("meta_test", "meta_test_by_images"):
            assert of_all["horizons"][str(horizon)][part] == own[part]
        assert of_all["config"]["meta_train"][str(horizon)] == train
    with open(swept / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for target, figure in (("stars", "accuracy-by-horizon.png"), ("stars@8", "accuracy-by-horizon@8.png")):
        own = [(row["horizon"], row["seed"]) for row in rows if (row["method"], row["task"]) == ("cts", target)]
        assert own == [("4", "0"), ("4", "1"), ("1", "0"), ("1", "1")]
        assert (swept / figure).read_bytes().startswith(b"\x89PNG")


def test_what_has_no_horizon_is_the_same_in_all_runs_of_a_sweep(swept):
    for name in ("finetune", "scratch"):
        found = [by_method["meta_test"][name] for by_method in results(swept)["horizons"].values()]
        assert found[0] == found[1]


def test_an_interrupted_sweep_goes_on_and_ends_in_the_same_results(swept, figures, tmp_path, monkeypatch, capsys):
    draw = plots.convergence

    def signalled(path, *arguments):
        draw(path, *arguments)
        if path.parent.name == "horizon-1":
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(plots, "convergence", signalled)
        assert run(tmp_path, *SWEEP) == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "horizon-4" / "finished.json").exists()
    assert not (tmp_path / "horizon-1" / "finished.json").exists() and not (tmp_path / "results.json").exists()
    assert "interrupted" in refused(capsys, tmp_path, "--methods", "cts")  # a plain run takes it for what it is
    assert run(tmp_path, *SWEEP, "--resume") == 0
    text = capsys.readouterr().out
    of_all = text[text.rindex("Fine-tuned on 20 images:") :]
    assert "Fine-tuned on 8 images:" in of_all and of_all.count("K = 4") == 2 and "accuracy-by-horizon@8.png" in of_all
    for file in ("results.json", "metrics.csv", "horizon-4/results.json", "horizon-1/initialization.safetensors"):
        assert (tmp_path / file).read_bytes() == (swept / file).read_bytes(), file


def test_other_points_are_another_run_also_in_a_sweep(swept, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in swept.rglob("*") if path.name != ".lock"}
    assert "holds another run" in refused(capsys, swept, *SWEEP, "--points", "3", "--resume")
    assert {path: path.stat().st_mtime_ns for path in swept.rglob("*") if path.name != ".lock"} == before
    one = ["--horizon", "2", "--methods", "cts", "--targets", "rings"]
    assert run(tmp_path, *one) == 0
    assert results(tmp_path)["config"]["meta_train"]["snapshots"] == [2, 4]
    assert "snapshots" in refused(capsys, tmp_path, *one, "--points", "1", "--resume")
    assert run(tmp_path, *one, "--points", "2", "--resume") == 0


def test_compare_takes_the_runs_of_a_sweep_and_not_the_sweep(swept, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(swept), "--out", str(tmp_path / "out")])
    assert f"{swept} is a sweep, not a run: give one of its folders, horizon-1, horizon-4" in capsys.readouterr().err
    assert compare.main([str(swept / "horizon-4"), "--out", str(tmp_path / "out")]) == 0


def test_overwriting_a_sweep_takes_its_runs_away(tmp_path):
    assert run(tmp_path, "--horizon", "1,2", "--methods", "scratch", "--targets", "rings") == 0
    one = [*NET, "--methods", "scratch", "--targets", "rings", "--horizon", "1", "--overwrite"]
    assert run(tmp_path, *one) == 0
    assert not [path.name for path in tmp_path.glob("horizon-*")]


def test_horizons_that_do_not_divide_the_steps_are_refused(tmp_path, capsys):
    message = refused(capsys, tmp_path / "out", "--horizon", "3,4")
    assert "--horizon 3" in message and "8 steps" in message
    assert not (tmp_path / "out").exists()


def test_the_learners_momentum_goes_on_when_that_is_asked_for(tmp_path):
    some = [*NET, "--horizon", "2", "--methods", "cts", "--targets", "rings"]
    phis = {}
    for reset in ("--reset-momentum", "--no-reset-momentum"):
        assert run(tmp_path / reset, *some, reset) == 0
        assert results(tmp_path / reset)["config"]["meta_train"]["reset_momentum"] == (reset == "--reset-momentum")
        phis[reset] = (tmp_path / reset / "initialization-cts.safetensors").read_bytes()
    assert len({*phis.values()}) == 2


# Several numbers of images


def test_the_last_phi_is_tested_with_each_number_of_images(figures, tmp_path, capsys):
    some = ["--horizon", "2", "--methods", "cts", "--targets", "rings", "--test-steps", "20"]
    assert run(tmp_path / "both", *some, "--images", "20,8") == 0
    text = capsys.readouterr().out
    assert run(tmp_path / "few", *some, "--images", "8") == 0
    both, few = results(tmp_path / "both"), results(tmp_path / "few")
    assert both["meta_test_by_images"] == {"8": few["meta_test"]}
    assert both["meta_test"]["cts"] != few["meta_test"]["cts"] and "meta_test_by_images" not in few
    assert "Fine-tuned on 8 images" in text
    assert (both["config"]["meta_test"]["images"], both["config"]["meta_test"]["more_images"]) == (20, [8])
    with open(tmp_path / "both" / "metrics.csv", newline="") as file:
        steps = [(row["task"], row["step"]) for row in csv.DictReader(file) if row["phase"] == "meta-test"]
    assert {task_step for task_step in steps if task_step[0] == "rings@8"} == {("rings@8", "0"), ("rings@8", "4")}
    assert ("rings", "2") in steps
    assert (tmp_path / "both" / "gain-by-images.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_with_too_few_images_is_refused_among_several_numbers_and_named_beside_one(tmp_path, capsys):
    some = ["--horizon", "2", "--methods", "scratch", "--targets", "rings"]
    message = refused(capsys, tmp_path / "out", *some, "--images", "20,61")
    assert "--images 61" in message and "rings has 60 training images" in message
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", *some, "--images", "61") == 0
    assert results(tmp_path / "out")["config"]["fewer_images"] == {"rings": 60}
    assert "61 training images of 16 x 16 pixels (all there are: 60 of rings)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert run(tmp_path / "all", *some, "--images", "60") == 0
    assert "fewer_images" not in results(tmp_path / "all")["config"]
    assert "all there are" not in capsys.readouterr().out


# Dry runs


@pytest.mark.parametrize("horizon", ["3", "1", "1,2"])
def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(horizon, tmp_path, monkeypatch, capsys):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    arguments = ["--dry-run", "--horizon", horizon, "--methods", "cts,fomaml,leap,finetune", "--targets", "rings"]
    assert run(tmp_path / "out", *arguments) == 0
    assert not (tmp_path / "out").exists()
    assert not list(temporary.glob(f"{tempfile.gettempprefix()}*"))  # torch may have a cache there
    text = " ".join(capsys.readouterr().out.split())
    for words in ('meta_lr: {"cts": 0.1', "stripes meta-train 60 / 30", "rings meta-test 60 / 30 4 16 x 16", "FOMAML"):
        assert words in text
    # (four methods at two points and scratch) x two seeds
    assert "rings 18 60 " in text and "In all about " in text


def test_a_dry_run_whose_gradients_are_not_finite_ends_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "out", "--dry-run", "--methods", "cts", "--lr", "1e30")
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message and "the lr (1e+30) is too large" in message and "task 'stripes'" in message


def test_a_dry_run_of_fine_tuning_alone(tmp_path, capsys):
    assert run(tmp_path / "out", "--dry-run", "--methods", "scratch", "--images", "20,8") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rings 2 20 " in text and "stars@8 2 8 " in text and "meta-training step size" not in text


# Weights from one task


def test_finetune_leaves_a_body_with_statistics_that_is_fit_to_begin_at(tmp_path, capsys):
    small = ["--horizon", "3", "--targets", "rings"]
    assert run(tmp_path / "one", *small, "--methods", "finetune", "--source", "dots") == 0
    body = load_file(tmp_path / "one" / "body-finetune.safetensors")
    phi = load_file(tmp_path / "one" / "initialization-finetune.safetensors")
    assert all(torch.equal(body[name], tensor) for name, tensor in phi.items())
    assert set(body) == set(SmallNet(2).body.state_dict()) and body["1.num_batches_tracked"] == 6
    capsys.readouterr()
    begin = ["--weights", str(tmp_path / "one" / "body-finetune.safetensors"), "--methods", "cts"]
    assert run(tmp_path / "two", *small, *begin) == 0
    assert "body-finetune.safetensors: all of the body" in capsys.readouterr().out
    assert results(tmp_path / "two")["meta_test"]["none"] == results(tmp_path / "one")["meta_test"]["finetune"]


def test_finetune_on_two_sources_trains_one_body_on_both(tmp_path):
    arguments = ["--horizon", "2", "--targets", "rings", "--methods", "finetune,mtl", "--source", "dots,stripes"]
    assert run(tmp_path / "both", *arguments, "--tasks", "dots,stripes") == 0
    found = results(tmp_path / "both")
    assert found["config"]["source"] == "dots,stripes"
    assert found["meta_train"]["finetune"] == found["meta_train"]["mtl"]  # of exactly these tasks
    assert not list((tmp_path / "both").glob("body-*"))


# The program imagenet


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(3)
    torch.save(SmallNet(2).state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_imagenet_compares_the_weights_with_what_begins_at_them(weights, figures, tmp_path):
    small = ["--preset", "quick", "--horizon", "2", "--size", "8", "--images", "20,10", "--weights", str(weights)]
    assert run(tmp_path / "out", *small, program=imagenet) == 0
    found = results(tmp_path / "out")
    assert set(found["meta_test"]) == {"none", "mtl", "reptile", "cts"} == set(found["config"]["methods"])
    assert set(found["meta_test_by_images"]["10"]) == set(found["meta_test"])
    assert found["config"]["meta_test"]["normalization"] == "own"
    assert found["config"]["meta_train"]["weight_decay"] == 0
    for name in ("accuracy-vs-steps.png", "gain-by-images.png"):
        assert (tmp_path / "out" / name).exists()


def test_imagenet_also_tests_a_random_body_when_asked_to(weights, tmp_path):
    small = ["--preset", "quick", "--size", "8", "--methods", "scratch", "--targets", "rings"]
    assert run(tmp_path / "out", *small, "--weights", str(weights), program=imagenet) == 0
    assert set(results(tmp_path / "out")["meta_test"]) == {"none", "scratch"}


def test_imagenet_takes_torchvisions_weights_from_the_data_root_and_fetches_them_when_asked(
    weights, tmp_path, monkeypatch, capsys
):
    content = weights.read_bytes()
    name = f"net-{sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / name).write_bytes(content)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(imagenet, "MODEL", NET[1])
    root = tmp_path / "root"
    root.mkdir()
    small = ["--preset", "quick", "--size", "8", "--methods", "none", "--targets", "rings", "--data-root", str(root)]
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path / "server")
    ) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{name}"
        monkeypatch.setattr(imagenet, "WEIGHTS", Archive(url, None, ".", (name,)))
        assert f"{root / name} is missing" in refused(capsys, tmp_path / "out", *small, program=imagenet)
        assert not list(root.iterdir())  # nothing is fetched unasked
        assert run(tmp_path / "out", *small, "--download", program=imagenet) == 0
        server.shutdown()
    assert results(tmp_path / "out")["config"]["weights"] == sha256(content).hexdigest()
    assert run(tmp_path / "again", *small, program=imagenet) == 0
    (root / name).write_bytes(content[:-1])
    assert "is damaged" in refused(capsys, tmp_path / "third", *small, program=imagenet)


def test_imagenet_names_a_method_without_held_out_images_as_it_was_typed(weights, tmp_path, capsys):
    small = ["--preset", "quick", "--size", "8", "--methods", "fomaml@0.1", "--weights", str(weights)]
    message = refused(capsys, tmp_path / "out", *small, program=imagenet)
    assert "fomaml@0.1 needs held-out images of every task, and stripes, dots, waves hold none back" in message
    assert "--held-back F" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--weights FILE"),
        (["--model", "resnet34"], "resnet34"),
        (["--data-root", "/nope"], "the data root /nope does not exist"),
    ],
)
def test_imagenet_without_weights_says_how_to_get_them(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        imagenet.main(["--suite", "tiny", "--out", str(tmp_path / "out"), *arguments])
    assert words in capsys.readouterr().err
