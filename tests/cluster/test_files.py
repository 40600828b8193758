"""A file is whole whoever writes it at the same moment: two commands that begin at once leave the same files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from cluster.files import write_whole


def test_writers_at_once_do_not_take_each_other_s_draft(tmp_path):
    """With one draft for all, the second finds that the first has moved it away: seen each time, of 400 writes."""

    def writes(content):
        return [write_whole(tmp_path / "file", content) for _ in range(100)]

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(writes, word * 1000) for word in "abcd"]:
            done.result()
    assert (tmp_path / "file").read_text() in {word * 1000 for word in "abcd"}
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
