"""Dealing by predicted cost, and the checks that name a process."""

import itertools

import pytest
import torch

from ssrctl.distributed.dealing import Share, deal, deal_questions
from ssrctl.distributed.exchange import check_replicas, weights_fingerprint
from ssrctl.distributed.launch import check_config
from ssrctl.distributed.world import check_launcher
from ssrctl.errors import Failed, UserError


def test_every_job_is_dealt_once_and_the_largest_sum_is_near_the_best() -> None:
    costs = [7.0, 3.0, 3.0, 5.0, 1.0, 4.0, 2.0]
    for size in (1, 2, 3, 9):
        dealt = deal(costs, size)
        assert sorted(itertools.chain(*dealt)) == list(range(7)) and len(dealt) == size
        assert all(jobs == sorted(jobs) for jobs in dealt)
        best = min(
            max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == r) for r in range(min(size, 3)))
            for owners in itertools.product(range(min(size, 3)), repeat=7)
        )
        if size <= 3:
            assert max(sum(costs[job] for job in jobs) for jobs in dealt) <= 4 / 3 * best
    assert deal([0.0] * 4, 2) == [[0, 2], [1, 3]], "jobs that cost nothing are dealt evenly"


def test_more_processes_than_questions_split_responses() -> None:
    costs = [[1.0, 1.0, 5.0, 1.0], [9.0, 1.0, 1.0, 1.0]]
    for size in range(1, 9):
        dealt = deal_questions(costs, size)
        assert len(dealt) == size and all(dealt), "no process is without work"
        found = sorted((share.question, row) for mine in dealt for share in mine for row in share.responses)
        assert found == list(itertools.product(range(2), range(4)))
        assert [share.question for mine in dealt for share in mine if share.leads] == ([0, 1] if size == 1 else [1, 0])
        assert all(rank in share.team for rank, mine in enumerate(dealt) for share in mine)
    assert [share.team for mine in deal_questions(costs, 3) for share in mine] == [range(2), range(2), range(2, 3)]
    assert [len(mine) for mine in deal_questions(costs, 3, split=False)] == [1, 1, 0]
    assert sum(map(bool, deal_questions([[1.0, 1.0]], 4))) == 2, "no process has an empty share"
    assert deal_questions(costs, 3)[0][0] == Share(1, [0], range(2), leads=True), "the costliest has the larger team"


def test_the_fingerprint_sees_one_bit_and_a_swap_of_tensors() -> None:
    weights = [torch.ones(5, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.bfloat16)]
    before = weights_fingerprint(weights)
    assert weights_fingerprint(weights[::-1]) != before
    weights[1].view(torch.int16)[4] = 1
    assert weights_fingerprint(weights) != before
    check_replicas([5, 5, 5], "after step 3")
    with pytest.raises(Failed, match=r"after step 3 the weights of processes 1, 2 differ from those of process 0"):
        check_replicas([5, 6, 5 - 1], "after step 3")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("distributed_type: DEEPSPEED", "asks for DEEPSPEED"),
        ("distributed_type: FSDP", "asks for FSDP"),
        ("distributed_type: MULTI_GPU\nmixed_precision: fp8", "asks for fp8"),
        ("- 1", "holds no settings"),
        ("{", "cannot be read"),
    ],
)
def test_launcher_settings_that_we_do_not_have_are_refused(tmp_path, settings, said) -> None:
    path = tmp_path / "accelerate.yaml"
    path.write_text(settings)
    with pytest.raises(UserError, match=said):
        check_config(path)
    with pytest.raises(UserError, match="not found"):
        check_config(tmp_path / "none.yaml")


def test_a_foreign_launcher_with_such_settings_is_refused() -> None:
    for key, name in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP")):
        with pytest.raises(UserError, match=f"asks for {name}"):
            check_launcher({key: "true"})
    with pytest.raises(UserError, match="fp8"):
        check_launcher({"ACCELERATE_MIXED_PRECISION": "fp8"})
    check_launcher({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "false"})
