"""Tasks over ranks: real processes, gloo between them. Oracle: one process with all tasks."""

from itertools import chain

import pytest
import torch
from support import rank_checks as checks
from support.step_cases import Case, places

from cts_fast import ShiftingMetaOptimizer
from cts_fast.baselines import METHODS
from cts_fast.distributed import StateByTask
from cts_fast.distributed.flags import FLAGS

LAYOUTS = [(4, 4), (3, 3, 2), (2, 2, 2, 2)]
HEADS = tuple(((t % 3 + 1,),) * (t % 2) for t in range(8))  # of several shapes; some tasks have none
OPTIONS = dict(lr=0.05, momentum=0.9, weight_decay=0.01, meta_lr=0.3, horizon=30)
EXACT = Case(8, ((5, 3), (7,), ()), HEADS, torch.float64, steps=200, options=OPTIONS)
PAIR = Case(2, ((5, 3), (7,)), dtype=torch.float64, steps=6, options={**OPTIONS, "horizon": 4})
BACKENDS = [name for name, device in places() if device == "cpu" and name not in ("triton", "cuda")]


def assert_agree(pool, case, layout, *given, tolerance=1e-12):
    """φ of the ranks is that of one process, and bit-identical on all of them, after every step."""
    alone, _, counters = checks.trajectory(None, case, (case.tasks,), *given)
    found = pool.values(len(layout), checks.trajectory, case, layout, *given)
    for phis, _, counted in found:
        assert torch.equal(phis, found[0][0]) and counted == counters
    assert (found[0][0] - alone).norm() <= tolerance * alone.norm()
    return found


@pytest.mark.parametrize(
    ("layout", "backend"), [(layout, "auto") for layout in LAYOUTS] + [(LAYOUTS[1], name) for name in BACKENDS], ids=str
)
def test_the_answer_does_not_depend_on_how_tasks_are_spread(pool, layout, backend):
    assert_agree(pool, EXACT, layout, backend)


def test_one_rank_is_bit_equal_to_one_process_and_a_layout_to_itself(pool):
    case = Case(5, ((33,), (4, 3)), steps=20, options=dict(lr=0.1, momentum=0.9, meta_lr=0.3, horizon=7))
    first, again = (pool.values(2, checks.trajectory, case, (3, 2), "auto") for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
    (one,) = pool.values(1, checks.trajectory, case, (5,), "reference")
    assert torch.equal(one[0], checks.trajectory(None, case, (5,), "reference")[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_in_float32_is_within_4_ulp(pool, layout):
    case = Case(8, ((129,), (4, 3)), steps=20, options={**OPTIONS, "horizon": 6})
    assert max(pool.values(len(layout), checks.worst_ulps_of_single_steps, case, layout, "auto")) <= 4


@pytest.mark.parametrize("layout", [(3, 1), (1, 1, 2)], ids=str)
def test_networks_in_training_agree(pool, layout):
    alone = checks.nets_trajectory(None, (4,))
    for found in pool.values(len(layout), checks.nets_trajectory, layout):
        for a, b in zip(found, alone, strict=True):
            assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("options", [dict(meta_interval=3, horizon=7), dict(meta_interval=2, horizon=None, shift=0.3)])
def test_intervals_and_resets_come_as_in_one_process(pool, options):
    case = Case(3, ((5, 3),), dtype=torch.float64, steps=25, options={**OPTIONS, **options, "dampening": 0.3})
    assert_agree(pool, case, (1, 2), "auto")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_agrees_in_its_float32_masters(pool, dtype):
    # where momentum, in the parameters' dtype, takes no part
    case = Case(3, ((129,),), dtype=dtype, steps=10, options=dict(lr=0.1, meta_lr=0.3, horizon=4))
    assert_agree(pool, case, (1, 2), "auto", tolerance=1e-6)


@pytest.mark.skipif(("triton", "cpu") not in places(), reason="Triton's interpreter does not run here")
def test_triton_agrees(pool):
    case = Case(3, ((130,), (3,)), (((2,),),) * 3, torch.float64, 3, options={**OPTIONS, "horizon": 2})
    assert_agree(pool, case, (1, 2), "triton")


@pytest.mark.parametrize("method", ["reptile", "mtl", "no-shift", "leap"])
def test_methods_agree(pool, method):
    case = Case(4, ((5, 3), (7,)), dtype=torch.float64, steps=20, options=dict(lr=0.05, momentum=0.9, horizon=6))
    assert_agree(pool, case, (3, 1), "auto", checks.METHODS[method])


def test_a_meta_update_is_one_all_reduce_and_a_step_without_one_talks_to_nobody(pool):
    case = Case(2, ((64,), (32, 2)), steps=4, options=dict(lr=0.1, meta_lr=0.1, meta_interval=2))
    for found in pool.values(2, checks.collectives, case, (1, 1)):
        assert found == [[], [128 + FLAGS]] * 2
    waits = Case(2, ((5,),), steps=3, options=dict(lr=0.1, meta_interval=3))
    assert pool.values(2, checks.steps_without_company, waits, (1, 1)) == [1, 1]


def test_ranks_that_disagree_all_hear_what_about(pool):
    case = Case(3, ((4, 3), (2,)))
    transposed = dict(case=dict(layout="transposed"))
    changes = {
        "lr of shared group 0 is 0.5 on rank 2, but 0.001 on rank 0": dict(lr=0.5),
        "meta_lr of shared group 0 is 0.5 on rank 2": dict(meta_lr=0.5),
        "horizon of shared group 0 is 7 on rank 2": dict(horizon=7),
        "nonfinite is 'skip' on rank 2": dict(nonfinite="skip"),
        "the method is 'Reptile' on rank 2": dict(cls="reptile", horizon=1000),
        "cts_fast's version is '9' on rank 2": dict(version="9"),
        "the name of shared parameter 0 is 'bias.0' on rank 2": dict(name="bias"),
        "the shape of parameter 'weight.0' is (5, 3) on rank 2": dict(case=dict(shapes=((5, 3), (2,)))),
        "the dtype of parameter 'weight.0' is 'torch.float64' on rank 2": dict(case=dict(dtype=torch.float64)),
        "the strides of parameter 'weight.0' is (1, 4) on rank 2": transposed,
        "the number of shared parameters is 3 on rank 2": dict(case=dict(shapes=((4, 3), (2,), (1,)))),
        "rank 2 raised, so that no rank goes on: ValueError: Invalid learning rate: -1": dict(lr=-1.0),
    }
    found = pool.values(3, checks.disagreements, case, list(changes.values()))
    assert found[0] == found[1]
    for expected, *errors in zip(changes, *found, strict=True):
        assert expected in errors[0]
        assert errors[2] == errors[0] or "Invalid learning rate" in errors[2]


def test_what_cannot_run_over_ranks_says_why(pool):
    methods = ["fomaml", "fomaml++", "imaml", "random-shift", "cts-accurate"]
    for found in pool.values(2, checks.refusals, methods):
        *refused, capturable, copied, pickled = found
        assert all("runs in one process: " in error for error in refused) and len(set(refused)) == 5
        assert "capturable=False" in capturable
        assert copied == pickled and "neither copied nor pickled" in copied


def test_what_is_no_group_is_refused():
    with pytest.raises(ValueError, match="'nccl' is no torch.distributed group"):
        checks.ShiftingMetaOptimizer([torch.nn.Parameter(torch.ones(2))], process_group="nccl")


def test_a_gradient_that_is_not_finite_is_reported_on_all_ranks(pool):
    found = pool.values(3, checks.step_with, checks.replace(PAIR, tasks=4), (1, 1, 2), checks.put_nan, "reference")
    assert all(not error for faults, *_ in found for error, _ in faults)  # ignored by default
    for name in BACKENDS:
        given = (checks.replace(PAIR, tasks=4), (1, 1, 2), checks.put_nan, name, "raise")
        for ((error, same), _), counters, _ in pool.values(3, checks.step_with, *given):
            assert error.startswith(
                "NonFiniteOnRank: rank 2, task 0, parameter '1': the gradient of the last step held"
            )
            assert not same and counters[0] == 0  # applied, and counted; four steps are a round


def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(pool):
    given = (checks.replace(PAIR, tasks=4), (1, 1, 2), checks.put_nan, "auto", "skip")
    for (skipped, taken), counters, phi in pool.values(3, checks.step_with, *given):
        assert skipped == ("", True) and taken == ("", False)
        assert counters == [3, 0, 3, 1] and phi.isfinite().all()


def test_an_infinity_that_a_scaler_found_skips_the_step_on_all_ranks(pool):
    case = Case(2, ((5, 3),), steps=2, options=OPTIONS)
    assert pool.values(2, checks.scaled_step, case, (1, 1)) == [(False, True)] * 2


def test_a_rank_that_raises_where_all_vote_takes_the_others_with_it_and_all_can_go_on(pool):
    given = (checks.replace(PAIR, tasks=3), (1, 2), checks.put_sparse, "auto", "skip")
    (first, second) = pool.values(2, checks.step_with, *given)
    assert first[0][0][0].startswith("RankError: rank 1 raised, so that no rank goes on: ValueError: task 0")
    assert second[0][0][0].startswith("ValueError: task 0, parameter '0': gradient is torch.sparse")
    for (failed, after), counters, phi in (first, second):
        assert failed[1] and after == ("", False) and counters[:3] == [3, 0, 3] and torch.equal(phi, first[2])


def test_ranks_stay_together_after_one_fault_and_another(pool):
    for rank, (errors, counters) in enumerate(pool.values(2, checks.faults_in_turn, PAIR, (1, 1))):
        cause = "ValueError" if rank else "RankError: rank 1 raised"
        assert [error[: len(cause)] for error in errors] == ["", cause, "", cause, cause, ""]
        assert counters == [2, 0, 2, 1]


def test_a_rank_that_raises_before_a_meta_update_is_due_tells_the_others_there(pool):
    case = Case(2, ((5,),), options=dict(lr=0.1, meta_interval=2))
    found = pool.values(2, checks.closure_that_raises, case, (1, 1))
    # rank 0 takes its first step alone and hears of it in the second one
    assert found[0][0] == "" and "rank 1 raised" in found[0][1] and "KeyError: 'a batch'" in found[0][1]
    assert found[1][0] == "KeyError: 'a batch'"


def test_a_hyper_parameter_that_changes_on_one_rank_is_named_on_all(pool):
    for ((error, _), _), _, _ in pool.values(2, checks.step_with, PAIR, (1, 1), checks.other_lr):
        reason = "RanksDiffer: process_group: lr of shared group 0 is 0.25 on rank 1, but 0.05 on rank 0"
        assert error.startswith(reason)


def test_ranks_whose_counters_part_hear_of_it(pool):
    for ((error, _), _), _, _ in pool.values(2, checks.step_with, PAIR, (1, 1), checks.reset_alone):
        assert error.startswith("RanksDiffer: process_group: inner_step is 0 on rank 1, but 2 on rank 0")


def test_an_initialization_that_differs_is_found_in_the_next_round(pool):
    case = checks.replace(PAIR, options={**OPTIONS, "horizon": 3})
    for (now, next_round), _, _ in pool.values(2, checks.step_with, case, (1, 1), checks.other_phi):
        assert now[0] == "" and "the initialization of rank 1 is not rank 0's" in next_round[0]
    for same, other in pool.values(2, checks.loaded_initialization, PAIR, (1, 1)):
        assert same == "" and "the initialization of rank 1 is not rank 0's" in other


def test_a_rank_without_gradients_counts_its_steps(pool):
    for faults, counters, _ in pool.values(2, checks.step_with, PAIR, (1, 1), checks.no_gradients):
        assert faults == [("", False)] * 2 and counters == [0, 1, 4, 0]


def test_all_ranks_start_at_rank_0(pool):
    first, second = pool.values(2, checks.starts)
    assert first == ([1.0, 1.0], [1.0, 1.0], "")
    assert second[:2] == first[:2] and "parameter '0': differs from rank 0" in second[2]


def test_a_group_is_added_on_all_ranks_or_on_none(pool):
    (first, phi, count), (second, *others) = pool.values(2, checks.added_group)
    assert "rank 1 raised" in first[0] and "Invalid learning rate" in second[0]
    assert first[1] == second[1] and "lr of shared group 1 is 0.2 on rank 1, but 0.1 on rank 0" in first[1]
    assert first[2] == second[2] == "" and count == 2 and others == [phi, 2]
    assert phi == pytest.approx([1 - 1e-5, 1 - 1e-5, 2 - 1e-3])


@pytest.mark.parametrize("cls", [ShiftingMetaOptimizer, METHODS["leap"]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_number_of_ranks_goes_on_from_a_checkpoint_of_tasks(pool, tmp_path, cls, dtype):
    case = Case(3, ((5, 3), (7,), ()), HEADS[:3], dtype, options={**OPTIONS, "horizon": 7})
    tolerance = 1e-12 if dtype == torch.float64 else 1e-2

    def checkpointed(layout, save):
        """(θ, momentum and what else belongs to a task, φ, counters), before further steps and after them."""
        given = case, layout or (3,), str(tmp_path), save, cls
        found = pool.values(len(layout), checks.checkpointed, *given) if layout else [checks.checkpointed(None, *given)]
        for moment in range(2):
            yield [task for ranks in found for task in ranks[moment][0]], *found[0][moment][1:]

    saved = list(checkpointed((1, 2), save=True))
    for layout in [(1, 2), (2, 1), (1, 1, 1), (3,), None]:  # None: no process group at all
        for (tasks, phi, counters), (known, known_phi, known_counters), exact in zip(
            checkpointed(layout, save=False), saved, (True, layout == (1, 2)), strict=True
        ):
            assert counters == known_counters
            for a, b in zip([phi, *chain(*tasks)], [known_phi, *chain(*known)], strict=True):
                assert torch.equal(a, b) if exact else torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_names_of_tasks_are_as_many_as_the_tasks_and_apart(pool):
    for error in pool.values(2, checks.names_of_tasks, (["a"], ["a"])):
        assert error.startswith("RanksDiffer: tasks: ['a'] name several tasks")
    first, second = pool.values(2, checks.names_of_tasks, (["a"], ["b", "c"]))
    assert first.startswith("RankError: rank 1 raised") and "ValueError: tasks: ['b', 'c']; give a name" in second
    first, second = pool.values(2, checks.names_of_tasks, (["a"], None))
    assert first.startswith("RankError: rank 1 raised") and second.startswith("TypeError")
    assert pool.values(2, checks.names_of_tasks, (["a"], ["b"])) == ["", ""]


def test_ranks_that_broke_a_step_off_load_a_state_by_task_after_a_reset(pool, tmp_path):
    errors, loaded = zip(*pool.values(2, checks.state_of_torn_ranks, str(tmp_path)), strict=True)
    assert errors[0].startswith("RankError: rank 1 raised") and errors[1].startswith("Torn: ")
    assert loaded == (True, True)


def by_task_of(names=("a", "b"), heads=1, dtype=torch.float32, tasks=("one",), head_lr=0.1):
    """A state by task of shared parameters of one shape, and of so many heads of each task."""
    shared = [[(name, torch.nn.Parameter(torch.ones(2, dtype=dtype))) for name in names] for _ in tasks]
    own = [[torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(heads)] for _ in tasks]
    opt = ShiftingMetaOptimizer(shared, lr=0.1, heads=own if heads else None)
    opt.param_groups[-1]["lr"] = head_lr
    return StateByTask(opt, tasks)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"names": ("b", "a")}, "parameter shared 0 a torch.float32, where the optimizer has shared 0 b"),
        ({"names": ("a",)}, "parameter shared 0 b torch.float32, where the optimizer has heads 0 head.0 "),
        ({"heads": 0}, "parameter heads 0 head.0 torch.float32, where the optimizer has none"),
        ({"dtype": torch.float64}, "parameter shared 0 a torch.float32, where the optimizer has shared 0 a torch.flo"),
    ],
    ids=["names", "fewer", "no heads", "dtype"],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_by_task_of_other_parameters_is_refused(tmp_path, other, message):
    import torch.distributed.checkpoint as dcp  # slow to import

    dcp.save({"optimizer": by_task_of()}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=f"task 'one': was saved with the {message}"):
        dcp.load({"optimizer": by_task_of(**other)}, checkpoint_id=tmp_path)
    dcp.load({"optimizer": by_task_of(("_orig_mod.a", "b"))}, checkpoint_id=tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_state_by_task_is_not_loaded_without_one_of_its_tasks(tmp_path):
    import torch.distributed.checkpoint as dcp  # slow to import

    dcp.save({"optimizer": by_task_of(tasks=("one", "two"))}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"of the tasks \['one', 'two'\], but the optimizer has \['one'\]"):
        dcp.load({"optimizer": by_task_of()}, checkpoint_id=tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_heads_that_were_saved_with_other_options_do_not_share_a_group(tmp_path):
    import torch.distributed.checkpoint as dcp  # slow to import

    one, two = by_task_of().state_dict(), by_task_of(tasks=("two",), head_lr=0.2).state_dict()
    both = {"names": ["one", "two"], "common": one["common"], "tasks": one["tasks"] | two["tasks"]}  # as two ranks save
    dcp.save({"optimizer": both}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="heads 0, task 1: was saved with the options"):
        dcp.load({"optimizer": by_task_of(tasks=("one", "two"))}, checkpoint_id=tmp_path)


def test_what_one_rank_cannot_load_is_loaded_by_none(pool):
    first, second = pool.values(2, checks.refused_loads, PAIR, (1, 1))
    assert "rank 1 raised" in first[0][0] and "parameter groups" in second[0][0]
    assert first[1] == second[1] and "in the loaded state dict, the counters is [[0, 0, 0, 0]] on rank 1" in first[1][0]
    assert not any(changed for found in (first, second) for _, changed in found)
