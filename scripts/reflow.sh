#!/usr/bin/env bash
# The chain as a person would type it; `flowmatch run digits` does the same, and plans every stage first.
# Repeat a command to resume it; a finished stage says so.
set -euo pipefail
config=${1:-digits}
launch=(accelerate launch --config_file "${ACCELERATE_CONFIG:-configs/accelerate/cpu_2.yaml}")

"${launch[@]}" -m pipelines.train_flow "$config"                          # stage one: a flow
"${launch[@]}" -m pipelines.generate_pairs "$config"                      # stage two: straight pairs
python -m pipelines.train_classifier "$config"                            # for the feature loss
"${launch[@]}" -m pipelines.reflow "$config"                              # stage three: reflow
"${launch[@]}" -m pipelines.evaluate "$config"                            # quality against evaluations
python -m pipelines.export "$config"                                      # a diffusers folder
