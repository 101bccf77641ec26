"""Cards of exports: what a hub reads, picture and training; the upload, to a hub on this machine."""

import base64
import http.server
import json
import threading

import pytest
from huggingface_hub import ModelCard, constants
from PIL import Image

from flowmatch import cli
from flowmatch.config import UserError
from flowmatch.export import provenance
from flowmatch.runs import manifest
from pipelines import export, generate_pairs, reflow, train_flow
from tests.stages import UNET, run


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Digits by two steps of everything."""
    root = tmp_path_factory.mktemp("cards")
    net = json.dumps({"name": "UNet2DModel", **UNET})
    fit = ["fit.steps=4", "fit.batch_size=8", "fit.log_every=2"]
    run(train_flow, f"run_dir={root}/flow", "data.source=digits", f"net={net}", *fit)
    few = ["shards=1", "shard_size=16", "block=8", "compute_batch=16", "solver.steps=1"]
    run(generate_pairs, f"run_dir={root}/pairs", f"teacher={root}/flow", *few)
    pairs = f"pairs=[{{path: {root}/pairs}}]"
    run(reflow, f"run_dir={root}/reflow", f"start={root}/flow", pairs, *fit)
    words(root)
    return root


def words(root, *more):
    run(export, f"run_dir={root}/export", f"student={root}/reflow", "steps=[1,2]", *more)


def test_a_card_has_what_a_hub_shows(root):
    folder = root / "export"
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert card.data.license is None
    assert "**Licence: choose one.**" in card.text
    assert "![samples](samples.png)" in card.text
    picture = Image.open(folder / "samples.png")
    assert picture.mode == "RGB"
    assert picture.size[0] > 8 * 56
    assert "- flow: 4 updates of 8 on 1,797 samples of digits; " in card.text
    assert "- reflow: 4 updates of 8 on 16 pairs; " in card.text
    assert " s on cpu (" in card.text
    assert ", 1 process\n" in card.text
    assert str(root) not in card.text
    assert "samples.png" not in manifest.read(folder, "x")["outputs"]


@pytest.mark.slow
def test_a_licence_may_be_chosen_later(root, capsys):
    before = {p: p.stat().st_mtime_ns for p in (root / "export").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="license='Apache 2'"):
        words(root, "license=Apache 2")
    words(root, "license=apache-2.0")
    assert "is sealed, and made again are README.md" in capsys.readouterr().out
    card = ModelCard.load(root / "export/README.md")
    assert card.data.license == "apache-2.0"
    assert "choose one" not in card.text
    changed = {p.name for p, at in before.items() if p.stat().st_mtime_ns != at}
    assert changed - {".lock", "config.yaml"} == {"README.md"}
    words(root, "license=apache-2.0")
    assert "is sealed: nothing to do" in capsys.readouterr().out
    (root / "export/samples.png").unlink()
    words(root, "license=apache-2.0")
    assert "made again are samples.png" in capsys.readouterr().out
    assert (root / "export/samples.png").is_file()


def test_names_on_the_hub_are_told_and_paths_are_not(tmp_path):
    flow = tmp_path / "flow"
    flow.mkdir()
    data = {"source": "images", "path": "someone/cats"}
    text = {"start": "someone/ddpm", "data": data, "fit": {"steps": 7, "batch_size": 2}}
    (flow / "config.yaml").write_text(json.dumps(text))
    (flow / "metrics.jsonl").write_text('{"step": 7, "images_per_second": 0.001}\n')
    (flow / "hardware.json").write_text('{"device": "a GPU", "processes": 2}')
    for place in (
        flow,
        flow / "net",
        flow / "checkpoints/step_00000007",
        flow / "checkpoints/s/net_2",
    ):
        origin = provenance.trace(str(place))
        assert origin.lines == [
            "- flow: 7 updates of 2 on `someone/cats`; 3.9 h on a GPU, 2 processes"
        ]
        assert (origin.datasets, origin.base) == (["someone/cats"], "someone/ddpm")
    assert provenance.front("mit", "x", origin) == {
        "license": "mit",
        "pipeline_tag": "x",
        "base_model": "someone/ddpm",
        "datasets": ["someone/cats"],
    }
    text["data"]["path"], text["start"] = str(tmp_path), str(flow)  # itself: no endless way
    (flow / "config.yaml").write_text(json.dumps(text))
    origin = provenance.trace(str(flow))
    assert origin.lines[0].startswith("- flow: 7 updates of 2 on own images;")
    assert not origin.datasets
    assert not origin.base
    assert provenance.trace("nowhere").lines == []


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of a hub as an upload of small files needs."""

    def do_GET(self):
        self.answer({"name": "me", "type": "user", "auth": {}})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        hub.asked.append(self.path)
        if self.path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    hub.files[value["path"]] = base64.b64decode(value["content"])
            self.answer({"commitUrl": f"{hub.url}/me/digits/commit/0", "commitOid": "0" * 40})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.answer({"files": told})
        else:
            self.answer({"url": f"{hub.url}/me/digits", "warnings": [], "errors": []})

    def answer(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.files = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield server
    server.shutdown()


def test_an_export_is_pushed_as_a_person_types_it(root, hub, capsys):
    words = [f"run_dir={root}/pushed", f"student={root}/reflow", "steps=[1]", "license=mit"]
    cli.main(["export", *words, "device=cpu", "--push-to-hub", "me/digits"])
    assert f"uploaded to {hub.url}/me/digits" in capsys.readouterr().out
    assert "/api/repos/create" in hub.asked
    folder = root / "pushed"
    kept_back = {"config.yaml", ".lock"}
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - kept_back
    assert set(hub.files) == names
    assert {"README.md", "samples.png", "model_index.json", "manifest.json"} <= names
    for name, content in hub.files.items():
        assert (folder / name).read_bytes() == content
    assert ModelCard(hub.files["README.md"].decode()).data.license == "mit"


def test_the_flag_is_the_key():
    assert cli.as_keys(["a.yaml", "--push-to-hub", "a/b", "--dry-run"]) == [
        *("a.yaml", "push_to_hub=a/b", "--dry-run")
    ]
    assert cli.as_keys(["--push-to-hub=a/b"]) == ["push_to_hub=a/b"]
    assert cli.as_keys(["--push-to-hub"]) == ["push_to_hub="]
