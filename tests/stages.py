"""Stages in this process, and the small U-Net that tests give them."""

from flowmatch.runs.command import execute, load
from pipelines import (
    encode,
    encode_prompts,
    evaluate,
    evaluate_prompts,
    export,
    finish,
    generate_pairs,
    reflow,
    tiny_pipeline,
    train_classifier,
    train_flow,
)

UNET = {
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "add_attention": False,
}
MODELS = {
    tiny_pipeline: tiny_pipeline.TinyConfig,
    encode: encode.EncodeConfig,
    train_flow: train_flow.FlowConfig,
    train_classifier: train_classifier.ClassifierConfig,
    generate_pairs: generate_pairs.PairsConfig,
    encode_prompts: encode_prompts.EncodeConfig,
    reflow: reflow.ReflowConfig,
    finish: finish.FinishConfig,
    evaluate: evaluate.EvaluateConfig,
    evaluate_prompts: evaluate_prompts.EvaluatePromptsConfig,
    export: export.ExportConfig,
}


def run(stage, *words):
    """Run a stage on a CPU, to its end."""
    config, _ = load(MODELS[stage], ["device=cpu", *words])
    execute(stage.STAGE, config)
