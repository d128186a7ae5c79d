from pathlib import Path

import pytest
from PIL import Image

from aptp.cli import main
from aptp.pipeline import AptpPipeline
from tests.support.tiny_release import ANCHORS, build_release


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_release(tmp_path_factory.mktemp("cli") / "release", num_codes=2, with_teacher=False).path


def test_inspect_says_what_the_release_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(folder)])
    base, totals, _, *codes = capsys.readouterr().out.splitlines()
    assert base == "base tiny, latents 8 x 8, 12 text tokens"
    assert totals.startswith("2 codes, budget 0.60, mean MACs ratio 0.")
    assert totals.endswith("without the teacher")
    assert [line.split()[0] for line in codes] == ["0", "1"]


def test_draw_makes_the_image_that_the_pipeline_makes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "one.png"
    main(["draw", str(folder), ANCHORS[1], "--seed", "7", "--steps", "2", "--output", str(output)])
    made = AptpPipeline.from_release(folder)(ANCHORS[1], seeds=[7], num_inference_steps=2)
    assert Image.open(output).tobytes() == made.images[0].tobytes()
    assert f"code {int(made.routes.indices[0])}, " in capsys.readouterr().out


def test_a_folder_that_is_no_release_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .* holds no release\.json"):
        main(["inspect", str(tmp_path)])
