"""What the encoder remembers of words has a bound, which changes no ids: text without end fits in memory."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import vocabulary
from data_prep.documents import Document, Source
from data_prep.encoder import Encoder
from data_prep.recipe import BpeTokenizer
from data_prep.vocabulary import Vocabulary

LETTERS = str.maketrans("0123456789", "ghijklmnop")
BOUND = 96 << 20
"""The encoder begins anew when it has grown by so much; 10 MB of text are not enough for that, 80 MB are."""


def texts(megabytes: int, seed: int) -> list[str]:
    """Of words of eight letters, of which hardly two are the same."""
    draw = random.Random(seed)
    return [draw.randbytes(4000).hex(" ", 4).translate(LETTERS) for _ in range(megabytes * 10**6 // 9000)]


def trained() -> Vocabulary:
    known = [Document(text, len(text)) for text in texts(1, 0)[:20]]
    config = BpeTokenizer(type="bpe", vocab_size=600, sample_megabytes=1, min_frequency=1)
    return vocabulary.train(config, [Source("words", (), lambda: iter(known))])


def peak_bytes(folder: Path, tokenizer: Path, megabytes: int) -> int:
    """Of the largest process of a preparation with one worker: of two, how files fall to them would count."""
    folder.mkdir()
    found, files = texts(megabytes, megabytes), [folder / f"{number}.jsonl" for number in range(8)]
    for number, path in enumerate(files):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found[number::8]))
    command = [sys.executable, "-m", "data_prep.bench", "one", "turnout prepare, in stages"]
    arguments = map(str, (tokenizer, folder, 1, *files))
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True, timeout=120)
    peak: int = json.loads(done.stdout.splitlines()[-1])["peak"]
    return peak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process can tell its memory on Linux alone")
def test_eight_times_the_words_take_no_more_memory_than_may_be_remembered(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    trained().save(tmp_path / "tokenizer")
    small, large = (peak_bytes(tmp_path / str(size), tmp_path / "tokenizer", size) for size in (10, 80))
    assert large - small < BOUND, (small >> 20, large >> 20)


def test_an_encoder_that_forgets_all_the_time_makes_the_same_ids() -> None:
    known, batch = trained(), [text.encode() for text in texts(1, 1)[:4]]
    remembers, forgets = Encoder(known), Encoder(known, remembered_bytes=-(1 << 60))
    first = forgets._fast
    for _ in range(3):
        np.testing.assert_array_equal(forgets.encode(batch).ids_N, remembers.encode(batch).ids_N)
    assert forgets.name == remembers.name
    assert (forgets._fast is first) == (first is None)
