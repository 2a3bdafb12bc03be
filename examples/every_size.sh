#!/usr/bin/env bash
# Measure once, then solve for several sizes: examples/every_size.sh MODEL DIR
set -euo pipefail
isingcut energy "$1" --out "$2"
isingcut solve "$2" --remove 4 --remove 8 --remove 12
isingcut rank "$2" --remove 8
isingcut excise "$2" --remove 8
isingcut evaluate "$2" --remove 8
isingcut report "$2" --remove 8
