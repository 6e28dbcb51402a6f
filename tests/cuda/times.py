#!/usr/bin/env python3
"""Sums what ncu --csv says of gpu__time_duration.sum by kernel: milliseconds, launches, name; the longest first."""
import csv
import re
import sys
from collections import defaultdict

times = defaultdict(list)
with open(sys.argv[1]) as f:
    lines = [line for line in f if line.startswith('"')]        # ncu and the program write beside the table
for row in csv.DictReader(lines):
    scale = {"ns": 1e-6, "us": 1e-3, "usecond": 1e-3, "nsecond": 1e-6, "ms": 1, "msecond": 1}[row["Metric Unit"]]
    name = re.sub(r"\((unsigned )?(int|long|bool)\)", "", row["Kernel Name"]).split("(")[0]
    times[name].append(float(row["Metric Value"].replace(",", "")) * scale)
for name, each in sorted(times.items(), key=lambda item: -sum(item[1])):
    print(f"{sum(each):10.3f} ms {len(each):6d}  {name}")
