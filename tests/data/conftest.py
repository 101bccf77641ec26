import pytest


@pytest.fixture(autouse=True)
def offline(tmp_path_factory, monkeypatch):
    """Keep datasets' cache in a temporary folder, and the hub out of reach."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
