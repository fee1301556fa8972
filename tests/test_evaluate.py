"""notebooks/toy/evaluate.py: counting, tables, resuming, and the stored results."""

import json
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import erase
from notebooks.toy import evaluate, world

ALL = slice(None)


@pytest.mark.parametrize("hits, asked, expected", [
    (0, 50, "0.0 (0 to 7)"), (25, 50, "50.0 (37 to 63)"), (50, 50, "100.0 (93 to 100)"),
    (1, 3, "33.3 (6 to 79)")])
def test_wilsons_interval(hits, asked, expected):
    assert evaluate.share(hits, asked) == expected


def test_shares_are_taken_over_all_pictures_of_the_classes():
    confusion = {"star": {"star": 3, "heart": 1}, "heart": {"heart": 6}, "moon": {"star": 5}}
    assert evaluate.share_seen([confusion], [["star", "heart"]]) == evaluate.share(9, 10)
    assert evaluate.share_seen([confusion], [["moon"]]) == evaluate.share(0, 5)
    assert evaluate.share_seen([confusion] * 2, [["star"], ["moon"]]) == evaluate.share(3, 9)


def test_no_two_cells_have_the_same_key():
    keys = [cell.key for experiment in evaluate.EXPERIMENTS.values()
            for cell in experiment.cells(ALL)]
    assert len(keys) == len(set(keys)) > 100


def test_a_concept_is_erased_and_avoided_by_the_same_words():
    for concept, words in (("star", "star"), ("dots", "a picture in the style of dots")):
        assert evaluate.esd_x(concept).erase["concepts"] == [words]
        assert evaluate.negative(concept).how == {"negative": words}
        assert evaluate.sld(concept, "max").how == {"safe": words, "sld": "max"}


def test_a_rate_belongs_to_what_is_tuned(studio):
    """The parts of ESD-x get its rate; ESD-u's left 98 % of the stars to keys and values."""
    for contender, method in ((evaluate.esd_x("star"), "esd-x"), (evaluate.esd_u("star"), "esd-u"),
                              (evaluate.esd_x("star", method="esd-x-strict"), "esd-x"),
                              (evaluate.esd_u_as_written("star"), "esd-u")):
        assert studio.settings(contender)["lr"] == evaluate.RATES[method]


def counted(own: int, rest: int, concept: str) -> dict:
    """Ten pictures of each object: how many are right of the concept and of each other one."""
    return {name: {name: right, "none of these": 10 - right}
            for name in world.OBJECTS for right in [own if name == concept else rest]}


def test_the_table_of_objects_keeps_its_columns_apart():
    answers = {"objects/original": {"names": counted(10, 9, "star")},
               "objects/star/ESD-u": {"names": counted(1, 8, "star")},
               "objects/star/ESD-u, the paper's rule": {"names": counted(3, 6, "star")},
               "objects/star/ESD-x": {"names": counted(2, 7, "star")}}
    line = evaluate.objects_table(answers).splitlines()[2]
    shares = [float(cell.split()[0]) for cell in line.strip("| ").split("|")[1:]]
    assert line.startswith("| star |") and shares == [100, 10, 30, 20, 90, 80, 60, 70]


def test_bfloat16_rounds_weights_and_state_and_only_while_it_is_asked_for():
    weight = torch.nn.Parameter(torch.tensor([1.0, 0.3]))
    optimizer = torch.optim.Adam([weight], lr=1e-4)
    hook = register_optimizer_step_post_hook(evaluate.round_to_bfloat16)
    weight.sum().backward()
    optimizer.step()
    hook.remove()
    assert weight[0] == 1  # an update of 1e-4 is lost beside 1
    for tensor in (weight, optimizer.state[weight]["exp_avg_sq"]):
        assert torch.equal(tensor, tensor.bfloat16().float())
    optimizer.step()
    assert weight[0] != 1


def test_the_ablations_leave_nothing_behind(sd):
    """The paper's rule and bfloat16 are there for one erasure, not afterwards."""
    methods = set(erase.METHODS)
    how = {"iterations": 1, "steps": 2, "lr": 1e-5, "batch": 1}
    theta = evaluate.erased_weights(sd, concepts=["star"], method=evaluate.AS_WRITTEN, **how)
    ours = evaluate.erased_weights(sd, concepts=["star"], method="esd-u", **how)
    spared = set(theta) - set(ours)
    assert spared and all(name.startswith(erase.SPARED) for name in spared)
    rounded = evaluate.erased_weights(sd, concepts=["star"], method="esd-x", bfloat16=True, **how)
    assert all(torch.equal(t, t.bfloat16().float()) for t in rounded.values())
    exact = evaluate.erased_weights(sd, concepts=["star"], method="esd-x", **how)
    assert not all(torch.equal(t, t.bfloat16().float()) for t in exact.values())
    assert set(erase.METHODS) == methods


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_a_second_run_does_nothing_again(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    how = ["paraphrase", "--quick", "--results", file, "--run", tmp_path / "run",
           "--processes", 1]
    run(monkeypatch, *how)
    first, tables = json.loads(file.read_text()), capsys.readouterr().out
    assert "| star | by a paraphrase |" in tables and "--iterations 2" in tables
    assert first["paraphrase/star/by its name"]["seconds"] > 0
    monkeypatch.setattr(evaluate, "answer", None)  # would fail where a cell is made again
    run(monkeypatch, *how)
    assert capsys.readouterr().out == tables and json.loads(file.read_text()) == first

    first["paraphrase/moon/original"]["settings"]["seed"] = 7  # made otherwise: stale
    file.write_text(json.dumps(first))
    made = []
    found = first["paraphrase/star/original"] | {"name": {"moon": {"moon": 1}},
                                                 "paraphrases": {"moon": {"moon": 1}}}
    monkeypatch.setattr(evaluate, "answer",
                        lambda place, cell: made.append(cell.key) or (cell, found))
    run(monkeypatch, *how)
    assert made == ["paraphrase/moon/original"]


def test_two_processes_give_what_one_gives(tmp_path):
    place = (Path("notebooks/toy"), tmp_path, 2, 2)
    cells = [evaluate.Cell("paraphrase", concept, evaluate.ORIGINAL, (evaluate.name,))
             for concept in ("star", "moon", "arrow")]
    one, two = (sorted(evaluate.answers(place, cells, n), key=lambda pair: pair[0].concept)
                for n in (1, 2))
    assert one == two and [cell.concept for cell, _ in one] == ["arrow", "moon", "star"]
    assert one[0][1]["name"] == {"arrow": {"arrow": 2}}


def test_no_process_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "eta", "--quick", "--processes", 0)
    assert end.value.code == 2 and "processes is 0" in capsys.readouterr().err


def test_damaged_results_are_refused(tmp_path, monkeypatch, capsys):
    file = tmp_path / "results.json"
    file.write_text("{")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "eta", "--quick", "--results", str(file)])
    with pytest.raises(SystemExit) as end:
        evaluate.main()
    assert end.value.code == 2 and "isn't JSON" in capsys.readouterr().err
    assert file.read_text() == "{"


# The stored results

@pytest.fixture(scope="module")
def results():
    return json.loads(Path("notebooks/toy/results.json").read_text())


@pytest.fixture(scope="module")
def studio():
    """As the stored results were made, but without the censored miniature."""
    here = evaluate.open_studio(Path("notebooks/toy"), None, 50, evaluate.FLAGS["iterations"])
    return here._replace(weights={key: here.weights[key] for key in ("unet", "judge")})


def test_the_results_are_of_this_code_and_these_models(studio, results):
    for experiment in evaluate.EXPERIMENTS.values():
        for cell in experiment.cells(ALL):
            assert evaluate.is_stored(studio, cell, results), cell.key


def test_an_answer_of_other_settings_or_models_is_not_taken(studio, results):
    """All that it depends on is compared, but a censored model only where there is one."""
    esd = evaluate.Cell("implied", "moon", evaluate.esd_x("moon"), (evaluate.scenes,))
    censored = esd._replace(contender=evaluate.Contender("censored training", censored=True))
    other = {"weights": "0", "judge": "0", "seed": 1, "num": 49, "how": {}, "erase": {"eta": 7}}
    for cell, free in ((esd, set()), (censored, {"weights"})):
        assert evaluate.is_stored(studio, cell, results)
        for key, value in other.items():
            answer = results[cell.key]
            stale = answer | {"settings": answer["settings"] | {key: value}}
            taken = evaluate.is_stored(studio, cell, results | {cell.key: stale})
            assert taken == (key in free), key
    here = studio._replace(weights=studio.weights | {"censored": "0"})
    assert not evaluate.is_stored(here, censored, results)


def test_the_readme_says_the_settings(studio):
    assert evaluate.heading(studio) in Path("README.md").read_text()


@pytest.mark.parametrize("name", evaluate.EXPERIMENTS)
def test_the_readme_has_the_tables_of_the_results(results, name):
    experiment = evaluate.EXPERIMENTS[name]
    assert experiment.table(results) in Path("README.md").read_text()
    assert experiment.picture is None or Path(f"notebooks/toy/{name}.png").exists()
