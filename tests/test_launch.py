"""What launchers leave in the environment: a whole group, or one line that says what lacks."""

import pytest

from llmctl.cli import COMMANDS, LAUNCHED
from llmctl.errors import UserError
from llmctl.launch import GROUP, MPI, group_size, require_placed

WHOLE = {
    **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
}


@pytest.fixture
def launched(monkeypatch):
    """Set these variables, and no other of a launcher's."""

    def put(**variables):
        for name in (*GROUP, *MPI, *MPI.values()):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set"),
        ({"LOCAL_RANK": "0"}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
        ({"RANK": "3"}, "RANK=3 is set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "LOCAL_RANK, MASTER_PORT not"),
        ({**WHOLE, "MASTER_ADDR": ""}, "and MASTER_ADDR not"),
        ({**WHOLE, "WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a number"),
        ({**WHOLE, "RANK": "2"}, "ranks are 0 to 1"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2: processes of mpirun or srun"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"MV2_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE=2"),
    ],
)
def test_a_group_that_is_not_whole_is_refused(cli, launched, tokens, tmp_path, variables, said):
    launched(**variables)
    result = cli("pretrain", "--tokens", tokens, "--max-steps", 1, "-o", tmp_path / "run")
    assert result.code == 2, result.err
    error, hint = result.err.strip().splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert "--processes N" in hint
    assert not (tmp_path / "run").exists()


def test_of_processes_of_mpirun_one_speaks(cli, launched, tokens, tmp_path):
    launched(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1")
    result = cli("pretrain", "--tokens", tokens, "--max-steps", 1, "-o", tmp_path / "run")
    assert (result.code, result.err) == (2, "")


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, 1),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "pod-0"}, 1),
        ({"LOCAL_RANK": "-1", "WORLD_SIZE": ""}, 1),
        ({"PMI_SIZE": "1"}, 1),
        (WHOLE, 2),
        ({**WHOLE, "PMI_SIZE": "2", "PMI_RANK": "1"}, 2),
    ],
)
def test_what_is_whole_is_taken(launched, variables, size):
    launched(**variables)
    assert group_size() == size


@pytest.mark.parametrize("command", COMMANDS)
def test_only_what_trains_shares_its_work(launched, command):
    """Each process of others would print or write all of it."""
    trains = command in LAUNCHED
    launched()
    require_placed(command, trains=trains)
    launched(**{**WHOLE, "WORLD_SIZE": "1"})
    require_placed(command, trains=trains)
    launched(**WHOLE)
    if trains:
        require_placed(command, trains=True)
        return
    with pytest.raises(UserError, match=f"`llmctl {command}` works in one process"):
        require_placed(command, trains=False)


@pytest.mark.parametrize("command", ["tokenize", "evaluate", "generate", "reward --score"])
def test_what_does_not_share_is_refused_by_one_voice(
    cli, launched, base, corpus, tmp_path, command
):
    out = tmp_path / "out"
    arguments = {
        "tokenize": ("--data", corpus, "-o", out),
        "evaluate": ("--model", base, "--data", corpus, "-o", out),
        "generate": ("--model", base, "--prompt", "The"),
        "reward --score": (corpus, "--model", base, "-o", out),
    }[command]
    for rank in ("0", "1"):
        launched(**{**WHOLE, "RANK": rank, "LOCAL_RANK": rank})
        result = cli(*command.split(), *arguments)
        assert (result.code, result.out) == (2, "")
        assert ("works in one process, and a launcher started 2" in result.err) == (rank == "0")
    assert not out.exists()


def test_a_container_that_knows_of_others_may_look_at_runs(cli, launched, base):
    """Such as one of Kubernetes, which has addresses and no launcher."""
    launched(WORLD_SIZE="2", RANK="1", MASTER_ADDR="pod-0", MASTER_PORT="23456")
    result = cli("runs", base)
    assert result.code == 0, result.err
