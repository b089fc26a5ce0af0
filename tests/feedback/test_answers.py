"""The file of answers holds whatever JSON can say."""

import json

from llmctl.feedback.answers import open_answers
from llmctl.feedback.questions import Question
from tests.run_files import read_rows, write_rows

HALF = "\ud83d"


def test_half_a_surrogate_pair_in_a_file_of_answers_is_read_and_written(tmp_path):
    """Another tool may have cut an emoji in two; UTF-8 cannot hold what is left of it."""
    given = {"prompt": HALF, "responses": ["a", HALF], "ranks": [1, 2], "annotator": "Ann"}
    file = write_rows(tmp_path / "answers.jsonl", [given])
    with open_answers(file, "Ann") as answers:
        assert list(answers.mine.values()) == [False]
        answers.add(Question("é", ("a", HALF)), [2, 1])
    assert [row["responses"] for row in read_rows(file)] == [["a", HALF], ["a", HALF]]
    last = file.read_bytes().splitlines()[-1].decode()
    assert '"é"' in last
    assert json.loads(last)["prompt"] == "é"
