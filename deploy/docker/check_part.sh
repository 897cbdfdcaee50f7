#!/bin/sh
# check_part.sh PART TORCH: stop a build that was not told, or told wrongly, what to become.
set -eu
case "$1 $2" in
  "trainer cpu" | "trainer cuda" | "rollout cpu" | "rollout cuda" | "rollout-cpu cpu") ;;
  " "*) echo "error: PART is not set; build with --build-arg PART=trainer, rollout (CUDA) or rollout-cpu" >&2; exit 1 ;;
  "trainer "* | "rollout "*) echo "error: TORCH is '$2'; it must be cpu or cuda" >&2; exit 1 ;;
  "rollout-cpu "*) echo "error: TORCH is '$2', but rollout-cpu takes cpu only" >&2; exit 1 ;;
  *) echo "error: PART is '$1'; it must be trainer, rollout (CUDA) or rollout-cpu" >&2; exit 1 ;;
esac
