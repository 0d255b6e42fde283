"""Checked files are kept for some minutes, within bounds, each for the person who checked it."""

from __future__ import annotations

from receiver.batch import checked_files
from receiver.batch.checked_files import CheckedFile, CheckedFiles


def of(name: str, size: int = 10) -> CheckedFile:
    return CheckedFile(name, b"x" * size)


def test_a_file_is_kept_for_its_person_alone_under_a_hash_of_all_of_it() -> None:
    kept = CheckedFiles()
    key = kept.keep("ann", of("spring"))
    assert len(key) == 64 and kept.get("ann", key) == of("spring")
    assert kept.get("ben", key) is None and kept.get("ann", "spring") is None
    others = (
        of("autumn"),
        of("spring", 11),
        CheckedFile("spring", b"x" * 10, "csv"),
        of("spring")._replace(is_pasted=False),
    )
    assert len({key, *(kept.keep("ann", each) for each in others)}) == 5


def test_a_file_leaves_after_half_an_hour() -> None:
    now = [0.0]
    kept = CheckedFiles(lambda: now[0])
    key = kept.keep("ann", of("spring"))
    now[0] = checked_files.SECONDS - 1
    assert kept.get("ann", key) == of("spring")
    now[0] = checked_files.SECONDS
    assert kept.get("ann", key) is None


def test_the_oldest_files_of_a_person_leave_and_those_of_others_stay() -> None:
    kept = CheckedFiles()
    bens = kept.keep("ben", of("ben's"))
    first, second = kept.keep("ann", of("1")), kept.keep("ann", of("2"))
    assert kept.keep("ann", of("1")) == first  # checked again, so it is the newer one
    third = kept.keep("ann", of("3"))
    assert [key for key in (first, second, third) if kept.get("ann", key)] == [first, third]
    assert kept.get("ben", bens)


def test_all_files_together_have_a_bound_of_bytes_and_of_number() -> None:
    kept, large = CheckedFiles(), checked_files.MAX_BYTES // 3
    keys = {name: kept.keep(name, of(name, large)) for name in "abcd"}
    assert [name for name, key in keys.items() if kept.get(name, key)] == ["b", "c", "d"]
    people = [str(number) for number in range(checked_files.MAX_FILES + 1)]
    keys = {name: kept.keep(name, of(name)) for name in people}
    assert [name for name in people if not kept.get(name, keys[name])] == ["0"]
