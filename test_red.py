"""Sanity checks of everything: `pytest test_red.py`."""
import argparse
import contextlib
import copy
import dataclasses
import doctest
import gc
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import warnings
from collections import Counter
from itertools import combinations_with_replacement
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

import data
import rapid
import red
import verify as checker
from rapid import Rollout
from verify import Verdict, extract, gold_problem, reasons, verify, verify_many

torch.set_num_threads(1)       # at these sizes threads only wait for each other, and other counts round differently
HERE = pathlib.Path(red.__file__).resolve().parent
REAL = pathlib.Path(os.environ.get("RED_DATA") or next(HERE.parent.glob("*/data/math500.jsonl"), HERE / "none" / "x").parent)
NO_POOL = ["--traces", "0"]


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


def toy_logps(theta):
    """Log-probs [9, 2] of all responses of two tokens of three; theta [4, 3]: logits of the first, of the second."""
    return torch.stack([theta[0].log_softmax(0).repeat_interleave(3), theta[1:].log_softmax(1).flatten()], 1)


def expected_gradient(theta, theta_mu, rewards, group_size, *, eta=math.inf, baseline="loo", norm="none"):
    """Exact E[-Lbar * gradient of Eq. (4)] and the exact policy gradient, [4, 3] each; eta None leaves w out.
    Every multiset of group_size responses goes through the functions above, weighted by its probability under mu."""
    theta = theta.clone().requires_grad_()
    logp, mu = toy_logps(theta), toy_logps(theta_mu)                                 # [9, 2] each
    exact, = torch.autograd.grad((logp.sum(1).exp() * rewards).sum(), theta, retain_graph=True)  # [4, 3]
    groups = list(combinations_with_replacement(range(9), group_size))               # K multisets
    orders = [math.factorial(group_size) // math.prod(math.factorial(g.count(i)) for i in set(g)) for g in groups]
    index = torch.tensor(groups)                                                     # [K, G]
    chance = torch.tensor(orders) * mu.sum(1)[index].sum(1).exp()                    # [K], sums to 1
    logp, mu, rewards = logp[index.flatten()], mu[index.flatten()], rewards[index.flatten()]  # [K G, 2] twice, [K G]
    mask = torch.ones_like(mu, dtype=torch.bool)                                     # [K G, 2]
    wc = torch.ones_like(rewards) if eta is None else rapid.importance_weights(logp, mu, mask, eta=eta)[1]  # [K G]
    adv, _ = rapid.group_advantages(rewards, wc, group_size, baseline=baseline, norm=norm)  # [K G]
    loss = rapid.rapid_loss(logp, mask, wc * chance.repeat_interleave(group_size), adv, denominator=group_size)
    return torch.autograd.grad(-loss, theta)[0], exact





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
            logp, _, mask = rapid.response_logps(model, rollouts)
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
        got, exact = expected_gradient(theta, theta_mu, REWARDS, group_size)
        assert error(got, exact) < 1e-10


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_group_value_is_biased_by_what_theory_says(group_size):
    """The response's own term in Eq. (2) adds -(1/G) sum_y pi(y) w(y) r(y) grad log pi(y): 1/G of the gradient on-policy."""
    for distance in (0.0, 0.5, 1.5):
        theta, theta_mu = policies(1, distance)
        got, exact = expected_gradient(theta, theta_mu, REWARDS, group_size, baseline="group")
        free = theta.clone().requires_grad_()
        log_pi, log_mu = toy_logps(free).sum(1), toy_logps(theta_mu).sum(1)
        coefficient = ((2 * log_pi - log_mu).exp() * REWARDS).detach()
        bias, = torch.autograd.grad((coefficient * log_pi).sum(), free)
        close(got - exact, -bias / group_size, 1e-10)
        if distance == 0:
            assert error(got, exact) == pytest.approx(1 / group_size, rel=1e-9)


def test_without_weights_the_gradient_is_biased_and_with_clipping_in_between():
    """Leaving w out is wrong off-policy; clipping at eta = 2 is a part of that, and vanishes on-policy."""
    for seed in range(5):
        theta, theta_mu = policies(seed, 1.0)
        errors = [error(*expected_gradient(theta, theta_mu, REWARDS, 2, eta=eta)) for eta in (None, 2.0, math.inf)]
        assert errors[0] > 0.1 and errors[2] < 1e-10 and errors[1] < errors[0]
        for eta in (None, 2.0):
            assert error(*expected_gradient(theta, theta, REWARDS, 2, eta=eta)) < 1e-10
    near, far = (error(*expected_gradient(*policies(0, d), REWARDS, 2, eta=2.0)) for d in (0.5, 2.0))
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
        got, exact = expected_gradient(theta, theta_mu, REWARDS, 2)
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
    logp, entropy, mask = rapid.response_logps(model, rollouts, temperature=temperature, chunk=3)
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
    logp, _, mask = rapid.response_logps(model, rollouts)
    assert mask.tolist() == [[True, True, True], [True, True, False]] and (logp[mask] < 0).all()


def positions_computed(model, rollouts, **settings):
    """rapid.score's log-probs and entropies, the gradient of a weighted sum, and the positions that the decoder was given."""
    model.zero_grad()
    given = []
    hook = model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs["input_ids"].numel()), with_kwargs=True)
    logp, entropy, mask = rapid.response_logps(model, rollouts, **settings)
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
    before = rapid.response_logps(model, rollouts)[0].detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = rapid.update(model, optimizer, rollouts, group_size=2, denominator=4.0)
    after = rapid.response_logps(model, rollouts)[0].detach()
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
        rapid.response_logps(model, toy_rollouts(groups=1))


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
    got, metrics = rapid_gradient(model, rollouts, token_budget=20, baseline="group")
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
        before = rapid.response_logps(model, rollouts)[0][:, 0]
    for item, x in zip(rollouts, before.tolist()):
        item.mu = [x]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(8):
        metrics = rapid.update(model, optimizer, rollouts, group_size=4, denominator=4.0)
    with torch.no_grad():
        after = rapid.response_logps(model, rollouts)[0][:, 0]
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
    logp, entropy, mask = rapid.response_logps(model, rollouts)
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


# ======================================================================================================================
# data.py
# ======================================================================================================================

def load(path, *rows, **options):
    """(problems, summary line) of a file, or of rows that are written to it first."""
    if rows:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = []
    return data.load(str(path), log=lines.append, **options), lines[0]


def error_of(call, *arguments, **options):
    with pytest.raises(data.DataError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500, "an error is one line"
    return message


# ------------------------------------------------------------------------------------------------ data.py: what is read
BOXED = "4 and 3.\n\\boxed{7}"
GSM8K = {"question": "Q?", "answer": "16 - 3 = <<16-3=13>>13 eggs.\nThat is $18.\n#### 18"}
GSM8K_TRACE = "16 - 3 = 13 eggs.\nThat is $18.\nThe answer is \\boxed{18}."
MATH = {"problem": "P?", "solution": r"So $x=\boxed{\frac{1}{2}}$.", "level": "Level 3", "type": "Algebra"}
AIME = {"id": 60, "problem": "P?", "question": "Q?", "answer": 204, "solution": "no box", "level": True, "type": [1]}
OLYMPIAD = {"question": "Q?", "context": None, "final_answer": ["$69$,$84$"], "subfield": "Algebra", "solution": ["h"]}
MATH8K = {"problem": "P?", "ground_truth_answer": "118", "solution": "$118$", "target": "118", "level": 5, "input": "i"}
COT = {"question": "Q?", "gt": "420", "answer": "420", "system": "s", "code": ["a {420}", "b {421}"], "response": ["c"]}
VERL = {"data_source": "aime", "prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}],
        "reward_model": {"ground_truth": "204", "style": "rule"}, "target": [{"role": "assistant", "content": "T"}]}
OURS = {"prompt": "Q?", "gold": "7", "traces": ["t1", "t2"], "system": "S", "level": "easy"}
CHAT = {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": BOXED}]}
SHAREGPT = {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Q?"},
                              {"from": "gpt", "value": BOXED}]}
ALPACA = {"instruction": "Add.", "input": "3, 4", "output": BOXED}
SCHEMAS = {"gsm8k": GSM8K, "math": MATH, "aime": AIME, "olympiad": OLYMPIAD, "math8k": MATH8K, "cot": COT, "verl": VERL,
           "ours": OURS, "chat": CHAT, "sharegpt": SHAREGPT, "alpaca": ALPACA}


@pytest.mark.parametrize("row, options, expected", [
    (GSM8K, {}, ("Q?", "18", (GSM8K_TRACE,))), (AIME, {}, ("P?", "204")),
    (MATH, {}, ("P?", r"\frac{1}{2}", (), "", "Level 3")),
    (MATH, {"trace_key": "solution"}, ("P?", r"\frac{1}{2}", (MATH["solution"],), "", "Level 3")),
    (OLYMPIAD, {}, ("Q?", "$69$,$84$", (), "", "Algebra")),
    (OLYMPIAD | {"final_answer": ["1", "2"], "context": "Given."}, {}, ("Given.\n\nQ?", "1, 2", (), "", "Algebra")),
    (MATH8K, {}, ("P?", "118", (), "", "5")),
    (COT, {}, ("Q?", "420", ("a {420}", "b {421}"))), (COT | {"code": None}, {}, ("Q?", "420", ("c",))),
    (VERL, {}, ("Q?", "204", ("T",), "S", "aime")), (VERL | {"target": None}, {}, ("Q?", "204", (), "S", "aime")),
    (OURS, {}, ("Q?", "7", ("t1", "t2"), "S", "easy")),
    (OURS | {"traces": [" ", "#### Step\n<<x>> so\n7"]}, {}, ("Q?", "7", ("#### Step\n<<x>> so\n7",), "S", "easy")),
    (CHAT, {}, ("Q?", "7", (BOXED,))), (CHAT | {"answer": "9"}, {}, ("Q?", "9", (BOXED,))),
    (CHAT | {"problem": "P?", "answer": 9}, {}, ("P?", "9", (BOXED,))),
    ({"messages": CHAT["messages"][:1], "answer": "9"}, {}, ("Q?", "9")),
    (SHAREGPT, {}, ("Q?", "7", (BOXED,), "S")), (SHAREGPT | {"gt": 8}, {}, ("Q?", "8", (BOXED,), "S")),
    ({"prompt": "Q?", "completion": BOXED}, {}, ("Q?", "7", (BOXED,))),
    ({"prompt": "Q?", "completion": GSM8K["answer"]}, {}, ("Q?", "18", (GSM8K_TRACE,))),
    ({"prompt": VERL["prompt"], "completion": VERL["target"], "answer": 1}, {}, ("Q?", "1", ("T",), "S")),
    (ALPACA, {}, ("Add.\n\n3, 4", "7", (BOXED,))), (ALPACA | {"input": ""}, {}, ("Add.", "7", (BOXED,))),
    ({"prompt": "Q?", "ground_truth": "5"}, {}, ("Q?", "5")),
    ({"q": {"text": "In?"}, "meta": {"a": {"b": 5}}, "sols": "one", "answer": 9},
     {"prompt_key": "q.text", "gold_key": "meta.a.b", "trace_key": "sols"}, ("In?", "5", ("one",))),
    ({"problem": "P?", "x.y": "dotted", "x": {"y": "inner"}}, {"gold_key": "x.y"}, ("P?", "dotted")),
    (CHAT | {"answer": "a\nb"}, {"gold_key": "answer", "trace_key": "messages"}, ("Q?", "a\nb", (BOXED,)))])
def test_recognised_fields(tmp_path, row, options, expected):
    [problem], _ = load(tmp_path / "a.jsonl", row, **options)
    assert problem == data.Problem(*expected, where=f"{tmp_path / 'a.jsonl'}:1")


@pytest.mark.parametrize("fields, gold", [
    ({"answer": 27.0}, "27"), ({"answer": -0.0}, "0"), ({"answer": 1e-5}, "0.00001"), ({"answer": " 7 "}, "7"),
    ({"answer": 10 ** 400}, "1" + "0" * 400), ({"answer": r"\boxed{7}"}, "7"), ({"answer": [1, 2.0, "x"]}, "1, 2, x"),
    ({"answer": "", "solution": r"so \boxed{6}"}, "6"), ({"answer": None, "output": r"\boxed{6}"}, "6"),
    ({"answer": "a\nb", "solution": r"\boxed{6}"}, "6"), ({"gold": [], "answer": "5", "solution": r"\boxed{6}"}, "5"),
    ({"answer": "The answer is 18."}, "18"), ({"gt": "So, the sum is 18."}, "18"), ({"gold": "There are 4 cats."}, "4"),
    ({"answer": "a #### b"}, "a #### b"), ({"answer": "It is odd."}, "It is odd."), ({"answer": "n is 3."}, "n is 3."),
    ({"answer": "Odd n above 3."}, "Odd n above 3."), ({"solution": r"\boxed{6}", "output": r"\boxed{5}"}, "6")])
def test_golds(tmp_path, fields, gold):
    def read_answer(text):
        return checker.extract(text)[0]
    assert load(tmp_path / "a.jsonl", {"problem": "P?"} | fields, read_answer=read_answer)[0][0].gold == gold


@pytest.mark.parametrize("text, gold", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{1} then \boxed{2", "1"), (r"\boxed{a{b}c}", "a{b}c"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\fbox{3}", "3"), (r"\boxed {4}", "4"), (r"\\boxed{5}", "5"),
    (r"} \boxed{6} }", "6"), (r"\framebox{7}", None), (r"\boxed{}", ""), ("no box", None), (r"{{\boxed{8}", "8"),
    (r"x \\\boxed{9}", "9"), (r"\boxed{a\}", None), (r"\boxed{\boxed{1}}", r"\boxed{1}"),
    ("\\boxed{" * 140_000, None), ("\\" * 900_000, None)])      # once took hours
def test_last_box(text, gold):
    assert data.last_box(text) == gold


def test_what_is_left_out_is_counted_and_named(tmp_path):
    path, blank = tmp_path / "a.jsonl", [None, "", " ", [], [""], "several\nlines", "x\n####"]
    rows = [{"problem": "P?", "answer": answer} for answer in blank]
    problems, line = load(path, AIME, *rows, {"problem": "P?"}, {"problem": "P?", "output": "no box"}, MATH)
    assert len(problems) == 2
    assert line == ("a.jsonl: 2 problems, 0 traces, 9 rows without an answer skipped (first a.jsonl:2); "
                    "read problem / answer, problem / solution")
    problems, line = load(path, OURS, COT, check_trace=lambda trace, gold: f"{{{gold}}}" in trace)
    assert [p.traces for p in problems] == [(), ("a {420}",)]
    assert "2 problems, 1 traces, 3 wrong traces dropped (first a.jsonl:1)" in line
    problems, line = load(path, OURS, COT, check_gold=lambda gold: "odd" if gold == "420" else None)
    assert [p.gold for p in problems] == ["7", "420"] and "4 traces (not verified), 1 golds not understood" in line
    assert "(first a.jsonl:2: odd)" in line
    assert [p.gold for p in load(path, {"problem": "none"}, OURS, AIME, COT, limit=2)[0]] == ["7", "204"]


def test_held_out_and_fingerprint():
    train = [data.Problem("What is  2+2?", "4", ("t",)), data.Problem("Other", "1")]
    kept, dropped = data.held_out(train, [data.Problem("WHAT is\n2+2? ", "4"), data.Problem("New", "1")])
    assert [p.prompt for p in kept] == ["New"] and [p.prompt for p in dropped] == ["WHAT is\n2+2? "]
    mark, other = data.fingerprint(train), [train[::-1], train[:1]]
    assert mark.startswith("2 problems, sha256 ") and len(mark) == 35
    assert data.fingerprint([dataclasses.replace(p, where="moved:1") for p in train]) == mark
    for change in ({"prompt": "2"}, {"gold": "2"}, {"traces": ("u",)}, {"traces": ()}, {"system": "s"}):
        other.append([dataclasses.replace(train[0], **change), train[1]])
    assert mark not in map(data.fingerprint, other)


BAD_ROWS = [  # row, options of load, what the message says after file:2:
    ([], {}, "found a list, allowed a JSON object"), (None, {}, "found null, allowed a JSON object"),
    ({"text": "t", "gold": 1}, {}, 'field prompt: found none in the fields "text", "gold", allowed prompt, problem, '),
    (OURS, {"prompt_key": "promt"}, 'field promt: found none in the fields "prompt", "gold", "traces", '),
    (OURS | {"prompt": 5}, {}, "field prompt: found 5, allowed text"),
    (OURS | {"prompt": {"a": 1}}, {}, 'field prompt: found the fields "a", allowed text'),
    (OURS | {"prompt": " \n"}, {}, "field prompt: found a blank, allowed a question"),
    (OURS | {"prompt": []}, {}, "field prompt: found the roles (none), allowed s?u"),
    (OURS | {"prompt": ["a"]}, {}, "field prompt[0].role: found null, allowed system, user"),
    (OURS | {"prompt": "ab\x00"}, {}, "field prompt: found U+0000 at position 3, allowed UTF-8, no NUL"),
    (OURS | {"gold": True}, {}, "field gold: found true, allowed text, a finite number or a list of them"),
    (OURS | {"gold": float("nan")}, {}, "field gold: found NaN, allowed text, a finite number"),
    (OURS | {"gold": [1, [2]]}, {}, "field gold[1]: found a list, allowed text, a finite number"),
    (OURS | {"gold": ["1", ""]}, {}, "field gold[1]: found an empty answer among others, allowed text"),
    (OURS | {"traces": ["a", 1.5]}, {}, "field traces[1]: found 1.5, allowed text;"),
    (OURS | {"system": 3}, {}, "field system: found 3, allowed text;"),
    (ALPACA | {"input": 1}, {}, "field input: found 1, allowed text;"),
    (VERL | {"reward_model": "204"}, {}, 'field reward_model.ground_truth: found "204" around ground_truth, allowed'),
    (VERL | {"prompt": VERL["prompt"] + VERL["target"]}, {}, "field prompt: found the roles sua, allowed s?u"),
    (VERL | {"prompt": [{"role": ["user"], "content": "x"}]}, {}, "field prompt[0].role: found a list, allowed system"),
    (VERL | {"target": [{"role": "user", "content": "x"}]}, {}, "field target: found the roles u, allowed s?u?a ("),
    (CHAT | {"messages": CHAT["messages"] * 2}, {}, "field messages: found the roles uaua, allowed s?ua?"),
    (SHAREGPT | {"conversations": [{"from": "bot"}]}, {}, 'field conversations[0].from: found "bot", allowed system'),
    (SHAREGPT | {"conversations": [{"from": "human", "value": 1}]}, {}, "field conversations[0].value: found 1, "),
    (b'{"prompt": "a" "gold": 1}', {}, "not valid JSON at column 16: Expecting ',' delimiter"),
    (b'{"prompt": "a\xff", "gold": 1}', {}, "field prompt: found U+DCFF at position 2, allowed UTF-8, no NUL"),
    (b'{"prompt": "a", "gold": ' + b"[" * 200_000, {}, "not valid JSON: maximum recursion depth"),
    (b'{"prompt": "a", "gold": ' + b"9" * 5000 + b"}", {}, "not valid JSON: Exceeds the limit"),
    (b'{"prompt": "a", "gold": 1} {}', {}, "not valid JSON at column 28: Extra data")]


@pytest.mark.parametrize("row, options, says", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_malformed_rows(tmp_path, row, options, says):
    path, good = tmp_path / "a.jsonl", OURS | {"promt": "Q?"} if options else OURS
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    path.write_bytes(json.dumps(good).encode() + b"\r\n" + line + b"\n")
    message = error_of(load, path, **options)
    assert message.startswith(f"{path}:2: {says}"), message
    assert "; repair" in message or "; remove" in message or "; write" in message


BOM, ROW = b"\xef\xbb\xbf", json.dumps(OURS).encode()
TABLE = b'prompt,problem,answer,completion\n,P?,7,"a, b\n7"\n\n,"Q,?",8,\n'
FILES = [  # name, bytes, the golds with their places or the error after the path
    ("a.jsonl", ROW + b"\n\n\n" + ROW, "7@1 7@4"), ("a.json", ROW, "7@1"),
    ("a.jsonl", BOM + ROW + b"\r\n" + BOM + ROW, "7@1 7@2"), ("a.json", b"[" + ROW + b",\n\n" + ROW + b"]", "7@1 7@2"),
    ("a.jsonl", b" [" + ROW + b",\n\n" + ROW + b"]\n", "7@1 7@2"), ("a.jsonl", BOM + b"[" + ROW + b"]", "7@1"),
    ("a.csv", TABLE, "7@3 8@5"), ("a.csv", BOM + TABLE, "7@3 8@5"),
    ("a.csv", TABLE + b",P?,7", ":6: found 3 columns, allowed 4 as in the first line; put texts"),
    ("a.csv", TABLE + b',P?,"7', ": cannot be read (unexpected end of data); check the source"),
    ("a.csv", TABLE + b",P\xff,7,\n", ":6: field problem: found U+DCFF at position 2, allowed UTF-8, no NUL;"),
    ("a.json", b'[\n {"prompt": "a", "gold": 1},\n {"prompt": "b" "gold": 2}\n]', ":3: not valid JSON at column 17: "),
    ("a.json", b'[{"prompt": "a", "gold": 1},\n\n {"prompt": 5, "gold": 2}]', ":2: field prompt: found 5, allowed"),
    ("a.jsonl", ROW.decode().encode("utf-16"), ":1: not valid JSON at column 1: Expecting value"),
    ("a.json", b"[]", ": field gold: found no answer in 0 rows of the fields (none)"),
    ("a.jsonl", b"", ": field gold: found no answer in 0 rows"), ("a.csv", b"", ": field gold: found no answer"),
    ("noend", b"x", ": found the file type (none), allowed .jsonl, .json, .csv, .parquet or a hub id; check the path"),
    ("a.parquet", b"no parquet", ": cannot be read (Parquet magic bytes"), ("", None, ": found a folder, allowed "),
    ("none.jsonl", None, ": found no such file, allowed "), ("a\0b.csv", None, ": found no such file, allowed ")]


@pytest.mark.parametrize("name, content, outcome", FILES, ids=range(len(FILES)))
def test_files(tmp_path, name, content, outcome):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if outcome[0] == ":":
        assert error_of(load, path).startswith(f"{path}{outcome}")
        return
    problems, _ = load(path)
    assert " ".join(f"{p.gold}@{p.where.rpartition(':')[2]}" for p in problems) == outcome
    assert problems[0].traces == (("a, b\n7",) if name == "a.csv" else ("t1", "t2"))
    assert name != "a.csv" or problems[1] == data.Problem("Q,?", "8", where=f"{path}:5")


def test_missing_fields_and_failing_libraries_are_one_line(tmp_path, monkeypatch):
    path, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    load(path, *[{"problem": "P?", "result": 5, "answer": 1}] * 2)
    assert error_of(load, path, gold_key="reslt").startswith(
        f'{path}: field reslt: found no answer in 2 rows of the fields "problem", "result", "answer", allowed an ')
    assert error_of(load, path, trace_key="tracs").startswith(f"{path}: field tracs: found it in no row of the fields ")
    calls, fake = [], types.SimpleNamespace(load_dataset=None, __version__="4.0.0")
    monkeypatch.setitem(sys.modules, "datasets", fake)
    fake.load_dataset = lambda *names, split: calls.append((*names, split)) or [GSM8K]
    for source in ("org/name", "org/name:test", "org/name:main:test"):
        assert data.load(source, log=calls.append)[0].where == source + ":1"
    assert calls[::2] == [("org/name", "train"), ("org/name", "test"), ("org/name", "main", "test")]
    fake.load_dataset = lambda *names, split: {}["no\nnetwork"]
    assert error_of(load, "org/a") == "org/a: cannot be read ('no\\nnetwork'); check the source"
    fake.__version__ = "3.6.0"
    assert error_of(load, "org/a").startswith("org/a: older versions can run code that a hub repository brings; pip")
    assert error_of(load, "folder/a.jsonl").startswith("folder/a.jsonl: found no such file"), "not taken for a hub id"
    parquet.write_text("any")
    for name, source in (("datasets", "org/a"), ("pyarrow", str(parquet))):
        monkeypatch.setitem(sys.modules, name, None)
        assert error_of(load, source).endswith("; pip install 'datasets>=4', or convert the data to JSONL")


def test_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, rng = tmp_path / "a[1]*.parquet", random.Random(0)
    pq.write_table(pa.Table.from_pylist([VERL, VERL | {"target": None}, VERL | {"reward_model": None}]), path)
    problems, line = load(path)
    assert [p.traces for p in problems] == [("T",), ()] and problems[1].where == f"{path}:2"
    assert "1 rows without an answer skipped (first a[1]*.parquet:3)" in line
    good = path.read_bytes()
    for _ in range(50):
        path.write_bytes(good[:rng.randrange(1, len(good))] + rng.randbytes(rng.randrange(100)))
        assert error_of(load, path).startswith(f"{path}: cannot be read (")
    pq.write_table(pa.table({"problem": ["P?"], "answer": [b"1"]}), path)
    assert error_of(load, path).startswith(f"{path}:1: field answer: found a bytes, allowed text, a finite number")


def test_command_line_alone_in_an_empty_folder(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-I", "data.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    (tmp_path / "data.py").write_bytes(pathlib.Path(data.__file__).read_bytes())
    (tmp_path / "a.jsonl").write_text('{"q": "\\u2019?", "a": 5}')
    summary, problem = run("a.jsonl", "--prompt-key", "q", "--gold-key", "a").stdout.split("\n", 1)
    assert summary == "a.jsonl: 1 problems, 0 traces; read q / a" and json.loads(problem)["prompt"] == "\u2019?"
    for source, says in (("a.jsonl", "a.jsonl:1: field prompt: found none in"), ("b.csv", "b.csv: found no such file")):
        failed = run(source)
        assert failed.returncode == 1 and failed.stdout == "" and failed.stderr.count("\n") == 1
        assert failed.stderr.startswith(f"error: {says}")


VALUES = [None, True, 0, 1e308, float("nan"), 10 ** 300, "", " ", "\x00", "\ud83d", "\u2028", "a\nb", "#### 3", "{{{{",
          "\\boxed{", "\\boxed{}", "\\" * 50, "}}", [], {}, [None], [[]], [{}], [{"role": "user"}], {"a": {}}, [["a"]],
          [{"role": "user", "content": "u"}], [1, "a", None], {"ground_truth": []}, [{"from": "human"}],
          [{"role": "assistant", "content": 5}], [{"from": "gpt", "value": "x"}]]
NAMES = ["prompt", "question", "answer", "gold", "messages", "conversations", "output", "a.b", "", "\ud800"]


def places(value, found):
    """Every container in a row with the keys to its children."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        places(value[key], found)
    return found


def mutate(row, rng):
    """A line of bytes: a row with values swapped, fields lost, nested or new, a byte damaged, or the end lost."""
    row = copy.deepcopy(row) | {rng.choice(NAMES): rng.choice(VALUES) for _ in range(rng.randrange(2))}
    for _ in range(rng.randint(1, 2)):
        holder, key = rng.choice(places(row, []) or [(row, "prompt")])
        change = rng.choice(["lose", "nest", "swap", "swap"])
        holder[key] = [holder[key]] if change == "nest" and row else copy.deepcopy(rng.choice(VALUES))
        if change == "lose":
            del holder[key]
    line = json.dumps(row, ensure_ascii=rng.random() < .5).encode("utf-8", "surrogatepass")
    damage, at = rng.randrange(8), rng.randrange(len(line))
    return line[:at] + (b"", rng.randbytes(1) + line[at + 1:])[damage] if damage < 2 else line


@pytest.mark.parametrize("schema", SCHEMAS)
def test_mutated_rows_end_in_a_problem_or_a_named_error(tmp_path, request, schema):
    """A good first row keeps the error of a file without answers away: the second is read, skipped, or named."""
    count = 10_000 if request.config.getoption("--runslow", default=False) else 300
    rng, outcomes = random.Random(schema), {"read": 0, "skipped": 0, "error": 0}
    for n in range(count):
        # A new name each time: some file systems write a file that is overwritten to the disk at once.
        path, line = tmp_path / f"{n}.jsonl", mutate(SCHEMAS[schema], rng)
        path.write_bytes(json.dumps(SCHEMAS[schema]).encode() + b"\n" + line)
        try:
            problems, summary = load(path)
        except data.DataError as error:
            assert str(error).startswith((f"{path}:1:", f"{path}:2:")) and "\n" not in str(error)
            outcomes["error"] += 1
            continue
        for problem in problems:
            for text in (problem.prompt, problem.gold, problem.system, problem.level, *problem.traces):
                assert isinstance(text, str) and "\0" not in text.encode().decode()
            assert problem.prompt.strip() and problem.gold.strip()
        assert len(problems) == 2 or "1 rows without an answer skipped" in summary or not line.strip()
        outcomes["read" if len(problems) == 2 else "skipped"] += 1
    assert min(outcomes.values()) > 1 and outcomes["error"] > 20, outcomes


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_is_never_in_memory_twice(tmp_path, request, kind):
    """The peak stays near what the problems hold, a tenth of the file, so that a reader that holds it shows at once."""
    size = 2 << 30 if request.config.getoption("--runslow", default=False) and kind == "jsonl" else 40 << 20
    path, count = tmp_path / f"a.{kind}", size // 30_000
    row = {"prompt": "Q?", "gold": 7, "completion": "t" * 2900, "extra": "u" * 27_000}
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist([row] * count), path, use_dictionary=False, row_group_size=100)
    else:
        path.write_text((json.dumps(row) + "\n") * count)
    tracemalloc.start()
    try:
        problems, peak = load(path)[0], tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(problems) == count
    assert peak < 1.25 * count * 2900 + (12 << 20 if kind == "parquet" else 4 << 20), f"{peak >> 20} MiB at the peak"


@pytest.mark.parametrize("name, problems, traces, gold, level", [
    ("gsm8k_test.jsonl", 1319, 1319, "18", ""), ("math500.jsonl", 500, 0, r"\left( 3, \frac{\pi}{2} \right)", "2"),
    ("aime24.jsonl", 30, 0, "204", ""), ("amc23.jsonl", 40, 0, "27", ""),
    ("minerva_math.jsonl", 272, 0, "1.6", "Introduction to Astronomy (8.282J Spring 2006)"),
    ("olympiadbench.jsonl", 675, 0, "2", "Combinatorics"), ("math_cot_100.jsonl", 100, 800, "420", "Level 3"),
    ("math8k_train.parquet", 8521, 0, "118", "5"), ("verl_schema_valid.parquet", 2019, 0, "204", "aime")])
def test_real_files(name, problems, traces, gold, level):
    """math8k has 8,523 rows; the answers of rows 5055 and 5159 are empty. No gold looks like a sentence."""
    if not (REAL / name).exists():
        pytest.skip(f"{REAL / name} is absent; set RED_DATA to a folder that has it")
    found, line = load(REAL / name, read_answer=lambda text: "a sentence")
    assert len(found) == problems and sum(len(p.traces) for p in found) == traces
    assert (found[0].gold, found[0].level) == (gold, level) and "a sentence" not in [p.gold for p in found]
    assert ("2 rows without an answer skipped (first math8k_train.parquet:5055)" in line) == name.startswith("math8k")
    assert all(p.system.startswith("Your task is to follow") for p in found) == name.startswith("verl")
    assert name != "gsm8k_test.jsonl" or all(data.last_box(p.traces[0]) == p.gold for p in found)


# ------------------------------------------------------------------------------------ data.py: token ids, order, chains
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
LEAVES_OUT = CHATML.replace("%}<|im", "if m.role != 'system' %}<|im", 1)
IN_FRONT = "<|im_start|>user\nBox it.\n\n1\n\n2?<|im_end|>\n<|im_start|>assistant\n"


def text_with(template, eos="<|endoftext|>", **options):
    """Text over bytes; the end of a turn is not the end of text, and plain text gets a begin token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[(words[0], 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=words[1:3], eos_token=eos)
    tokenizer.chat_template = template
    return data.Text(tokenizer, **options)


@pytest.mark.parametrize("template, expected", [
    (CHATML, "<|im_start|>system\nBox it.<|im_end|>\n" + IN_FRONT.replace("Box it.\n\n", "")), (REFUSES, IN_FRONT),
    (LEAVES_OUT, IN_FRONT), (None, "<|endoftext|>Problem: 1\n\n2?\nBox it.\nSolution:")])
def test_prompts(template, expected):
    """The instruction reaches the model whatever the template does with it, and blank lines of a problem stay."""
    text, problem = text_with(template, instruction="Box it."), data.Problem("1\n\n2?", "2")
    assert text.tokenizer.decode(text.prompt(problem)) == expected
    mine = text.prompt(dataclasses.replace(problem, system="Mine."))
    assert text.tokenizer.decode(mine) == expected.replace("Box it.", "Mine."), "the row's own system text comes first"
    bare = text.tokenizer.decode(text_with(template).prompt(problem))
    assert "Box" not in bare and "system" not in bare and (template or bare.endswith(">Problem: 1\n\n2?\nSolution:"))


@pytest.mark.parametrize("opening, trace, expected", [
    ("", "<think>So</think>", "<think>So</think>"), ("<think>\n", " <think>\nSo\n</think> 2.\n", "So\n</think> 2."),
    ("<think>\n", "<think>So", "So"), ("<think>", "<think>\nSo", "\nSo"), ("<think>\n", "So 2.", "So 2."),
    ("<think>\n\n</think>\n\n", "<think>So", "<think>So"), (None, "So 2. ", " So 2.")])
def test_traces_end_the_turn_and_open_no_thinking_twice(opening, trace, expected):
    text = text_with(None if opening is None else CHATML.replace("assistant\n", "assistant\n" + opening))
    ids = text.trace(trace)
    assert text.decode(ids) == expected and ids[-1] == text.end == (0 if opening is None else 2)
    for stops, more in ((None, set()), (5, {5}), ([5, 6], {5, 6})):
        assert text_with(text.tokenizer.chat_template, stops=stops).stops == {0, text.end} | more


@pytest.mark.parametrize("template, eos, says", [
    ("{% for m in messages %}", "<|endoftext|>", "--model: its chat template fails (TemplateSyntaxError("),
    ("{{ messages[0]['content'] + 1 }}", "<|endoftext|>", "--model: its chat template fails (TypeError("),
    ("{{ raise_exception('a\nb') }}", "<|endoftext|>", "--model: its chat template fails (TemplateError('a\\nb'));"),
    (None, None, "--model: its tokenizer has no end-of-sequence token: no answer could end; set eos_token")])
def test_tokenizers_that_cannot_be_used_are_one_line(template, eos, says):
    assert error_of(text_with, template, eos).startswith(says)


def test_encode():
    """Prompts of base + n tokens; what does not fit is left out and counted, nothing is cut."""
    text, lines = text_with(None), []
    problems = [data.Problem("x" * n, "1", ("y" * n, "y"), where=f"f:{n}") for n in (1, 8, 9, 30)]
    base = len(text.prompt(problems[0])) - 1

    def encode(**limits):
        limits = dict(max_prompt_tokens=base + 9, max_new_tokens=10, context=1 << 30) | limits
        return data.encode(text, problems, log=lines.append, **limits)
    items = encode()
    assert [item.problem for item in items] == problems[:3] and [len(item.traces) for item in items] == [2, 2, 1]
    assert [*items[1].prompt] == text.prompt(problems[1]) and [*items[1].traces[0]] == text.trace("y" * 8)
    assert {(ids.typecode, ids.itemsize) for item in items for ids in (item.prompt, *item.traces)} == {("i", 4)}
    assert lines[0].startswith(f"1 prompts are too long and left out (first f:30: {base + 30} tokens): allowed are ")
    assert lines[1] == "1 traces are longer than --max-new-tokens 10 and left out"
    assert [item.problem for item in encode(context=base + 8 + 10)] == problems[:2], "a context for prompt and answer"
    assert error_of(encode, max_prompt_tokens=9).startswith(f"every prompt is too long (first f:1: {base + 1} tokens)")
    assert error_of(encode, context=10) == "--max-new-tokens: found 10, allowed is below the context, 10; lower it"


def test_queue_loses_and_repeats_nothing():
    """Draws of a pool of 12 with some given back: every index once per epoch, other pools apart, and state is all."""
    queue, resumed = (data.Queue({"all": list(range(12)), "traced": [3, 5, 8]}, seed=7) for _ in range(2))
    used, traced, unused = queue.take("all", 5), queue.take("traced", 2), queue.take("all", 6)
    queue.give_back("all", unused)
    resumed.state = json.loads(json.dumps(queue.state))
    assert queue.take("all", 4) == unused[:4]
    used += unused[:4] + queue.take("all", 3)
    assert sorted(used) == list(range(12)) and sorted(traced + queue.take("traced", 1)) == [3, 5, 8]
    assert sorted(more := queue.take("all", 12)) == list(range(12)) and queue.state["all"]["epoch"] == 2
    assert resumed.take("all", 19) == used[5:] + more
    assert used == [0, 11, 4, 3, 5, 9, 6, 10, 1, 2, 7, 8] and data.seed_of(7, "rollout", 0, 1) == 1838839786878861626


@pytest.mark.parametrize("wasteful", [False, True])
def test_chains_are_worked_right(wasteful):
    """Every step is true modulo 10, leads from one value to the next, and the box holds the last."""
    held, longer = {p.prompt for p in data.chains(400, seed=0)}, []
    problems = data.chains(200, seed=0, exclude=held, wasteful=wasteful)
    for p, plain in zip(problems, data.chains(200, seed=0, exclude=held)):
        value, right = int(p.prompt[0]), ""
        for operator, operand in zip(p.prompt[1:-1:2], map(int, p.prompt[2::2])):
            old, value = value, {"+": value + operand, "-": value - operand, "x": value * operand}[operator] % 10
            again = f"-{operand}+{old}" if operator == "-" else f"{operand}{operator}{old}"
            step = f"{old}{operator}{operand}"
            right += f"{value}={step};{value}={again};" if wasteful else f"{step}={value};"
        assert (p.gold, p.traces) == (str(value), (right + "\\boxed{" + str(value) + "}",))
        assert p.level == ("extend" if "x" in p.prompt else "recall") and p.prompt == plain.prompt
        assert checker.verify(p.traces[0], gold=p.gold).correct
        longer.append((len(p.traces[0]) - 8) / (len(plain.traces[0]) - 8))      # \\boxed{ is one token
    assert len({p.prompt for p in problems} - held) == 200
    assert round(sum(longer) / 200, 1) == (2.0 if wasteful else 1.0)


def test_docstring_examples_of_data():
    assert doctest.testmod(data) == (0, 1)


# ======================================================================================================================
# red.py: the equations
# ======================================================================================================================

def test_eq6_smoothed_entropy_and_its_change():
    assert red.entropy_change(None, 2.0, 0.9) == (2.0, None)
    e, d = red.entropy_change(2.0, 1.0, 0.9)
    assert (e, d) == (pytest.approx(1.9), pytest.approx(0.1)) and red.entropy_change(2.0, 1.0, 0.0) == (1.0, 1.0)


@pytest.mark.parametrize("d_on, d_off, update, lam", [
    (0.1, 0.3, 3, 3.0), (0.1, 0.01, 3, 1.0), (0.01, 0.5, 3, 8.0), (0.0, 0.5, 3, 8.0), (0.1, 0.3, 2, 1.0),
    (None, 0.3, 3, 1.0), (0.1, None, 3, 1.0)])
def test_eq7_weight_is_the_ratio_between_one_rollout_and_a_group(d_on, d_off, update, lam):
    assert red.offline_weight(d_on, d_off, 8, update) == pytest.approx(lam, rel=1e-6)


@pytest.mark.parametrize("shift, beta", [("accuracy", 0.075), ("accuracy-reversed", 0.025), ("on-policy", 0.0),
                                         ("off-policy", 0.1)])
def test_eq8_teacher_weight(shift, beta):
    assert red.teacher_weight(0.25, shift, 0.1) == pytest.approx(beta)


@pytest.mark.parametrize("correct, adv", [([0, 0, 0, 0], 2.0), ([1, 0, 0, 0], 0.6 / 0.24 ** 0.5), ([1, 1, 1, 1], 0.0)])
def test_eq10_advantage_of_the_trace_in_its_group(correct, adv):
    assert red.offline_advantage(correct) == pytest.approx(adv, abs=1e-4)


def test_eq8_9_11_value_and_gradient_by_hand():
    """Two traces of two tokens and one. d rho / d log pi = rho with pi_off held fixed; beta = 0 is on-policy."""
    logp = torch.tensor([[0.5, 0.1], [0.2, 1.0]], dtype=torch.float64).log().requires_grad_()
    mask = torch.tensor([[True, True], [True, False]])
    adv, beta = torch.tensor([[2.0, 1.0], [0.1, 0.0]], dtype=torch.float64)
    loss, rho_sum = red.offline_loss(logp, mask, adv, beta, traces=3)
    rho = [0.5 / (0.1 + 0.9 * 0.5), 0.1 / (0.1 + 0.9 * 0.1), 1.0]
    assert loss.item() == pytest.approx(-(2 * (rho[0] + rho[1]) / 2 + rho[2]) / 3, rel=1e-12)
    assert rho_sum.item() == pytest.approx(sum(rho))
    loss.backward()
    wanted = torch.tensor([[-2 * rho[0] / 2 / 3, -2 * rho[1] / 2 / 3], [-1 / 3, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(logp.grad, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta, logp, gradient", [(0.0, -200.0, -1.0), (1.0, math.log(0.01), -0.01)])
def test_eq9_on_policy_where_pi_underflows_and_imitation_at_gamma_one(beta, logp, gradient):
    """exp(-200) is 0 in float32, and the ratio still 1. beta = 1: a token of probability 0.01 has 1 % of its gradient."""
    logp = torch.tensor([[logp]], requires_grad=True)
    loss, _ = red.offline_loss(logp, torch.tensor([[True]]), torch.ones(1), torch.tensor([beta]), traces=1)
    loss.backward()
    assert logp.grad.item() == pytest.approx(gradient)


# ======================================================================================================================
# red.py: one update, one phase
# ======================================================================================================================

@pytest.fixture(scope="module")
def tiny():
    """A random model of the built-in kind, its Text, a Config and twelve Items with a trace each."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    torch.manual_seed(3)
    model, tokenizer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(red.BASE)), AutoTokenizer.from_pretrained(red.BASE)
    cfg, _ = red.parse(["--prompts", "4", "--updates-per-phase", "2", "--adv-norm", "none", *NO_POOL])
    text = data.Text(tokenizer, "", 1)
    items = data.encode(text, data.chains(12, seed=5), max_prompt_tokens=32, max_new_tokens=48, context=128, log=print)
    return SimpleNamespace(model=model, tokenizer=tokenizer, cfg=cfg, text=text, items=items)


def fake_groups(tiny, count, seed, size=4):
    """Groups of random responses with random behaviour log-probs and rewards: off-policy, uneven lengths."""
    rng, groups = np.random.default_rng(seed), []
    for i in range(count):
        rollouts = []
        for j in range(size):
            ids = rng.integers(3, 19, rng.integers(2, 9)).tolist() + ([1] if j else [])
            mu = (-rng.random(len(ids)) * 4).tolist()
            rollouts.append(rapid.Rollout(tiny.items[i].prompt, ids, mu, float(j % 3 == i % 2), not j))
        groups.append(red.Group(i, rollouts, [r.reward for r in rollouts]))
    return groups


def gradient(tiny, groups, ranks=None, **changes):
    """(flat gradient, metrics) of red_gradient in float64 with a State in which Lbar is 6 and lam is not 1."""
    model, cfg = truly_double(copy.deepcopy(tiny.model)), dataclasses.replace(tiny.cfg, **changes)
    state = red.State(update=5, lbar=6.0, e_on=2.0, e_off=1.0)
    metrics, *_ = red.red_gradient(cfg, model, tiny.items, groups, state, ranks or red.Ranks())
    return torch.cat([p.grad.flatten() for p in model.parameters()]), metrics


def naive_logp(model, prompt, response, temperature=1.0):
    """Log-probs and entropies from full logits of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1:-1] / temperature
    logp = torch.log_softmax(logits, -1)
    return logp.gather(1, torch.tensor([*response])[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def test_eq12_gradient_equals_a_slow_reference(tiny):
    """Eq. (1) to (12) written out sequence by sequence from full logits, against red_gradient, in float64."""
    groups = fake_groups(tiny, 4, seed=1)
    got, metrics = gradient(tiny, groups, baseline="group", shift_gamma=0.1)
    model = truly_double(copy.deepcopy(tiny.model))
    on, off, h_on, h_off = 0.0, 0.0, [], []
    for group in groups:
        rewards, w, scored = [r.reward for r in group.rollouts], [], []
        for r in group.rollouts:
            logp, entropy = naive_logp(model, r.prompt, r.response)
            w.append(min(math.exp(float((logp.detach() - torch.tensor(r.mu, dtype=torch.float64)).sum())), 2.0))
            scored.append(logp)
            h_on += entropy.tolist()
        value = np.dot(w, rewards) / 4
        for a, r, logp in zip(w, rewards, scored):
            on = on - a * (r - value) * logp.sum() / (4 * 4 * 6.0)
        logp, entropy = naive_logp(model, tiny.items[group.index].prompt, tiny.items[group.index].traces[0])
        h_off += entropy.tolist()
        beta, p = 0.1 * (1 - sum(rewards) / 4), logp.exp()
        five = np.array([*rewards, 1.0])
        adv = (1 - five.mean()) / (five.std() + 1e-6)
        off = off - adv * (p / (beta + (1 - beta) * p).detach()).mean() / 4
    lam = float(np.clip(abs(0.1 * (np.mean(h_off) - 1.0)) / (abs(0.1 * (np.mean(h_on) - 2.0)) + 1e-8), 1, 4))
    assert metrics["lam"] == pytest.approx(lam, rel=1e-9) and 1 < lam < 4
    # apart, because autograd keeps a Python factor of a scalar in float32
    on, off = (torch.cat([g.flatten() for g in torch.autograd.grad(x, list(model.parameters()))]) for x in (on, off))
    wanted = on + lam / 4 * off
    assert (got - wanted).norm() / wanted.norm() < 1e-9


def test_gradient_does_not_depend_on_micro_batches(tiny):
    groups = fake_groups(tiny, 4, seed=2)
    full, _ = gradient(tiny, groups, tokens_per_microbatch=1 << 20)
    for budget in (1, 40, 90):
        parts, _ = gradient(tiny, groups, tokens_per_microbatch=budget)
        assert (parts - full).norm() / full.norm() < 1e-9


def test_off_weight_number_replaces_lam(tiny):
    """The two gradients are kept apart: with --off-weight 0 only the online one is left, and they add up linearly."""
    groups = fake_groups(tiny, 4, seed=3)
    g0, g1, g3 = (gradient(tiny, groups, off_weight=w)[0] for w in "013")
    torch.testing.assert_close(g0, gradient(tiny, groups, algo="rapid")[0], rtol=0, atol=0)
    assert ((g3 - g0) - 3 * (g1 - g0)).norm() / (g3 - g0).norm() < 1e-9


def test_ranks_without_any_gradient_leave_adam_alone(monkeypatch):
    """Zeros in place of no gradient would let Adam's moments move the weights, which one rank alone would not do."""
    ranks, p = red.Ranks(), torch.nn.Parameter(torch.ones(2))
    ranks.size = 2
    monkeypatch.setattr(red.dist, "all_reduce", lambda tensor: tensor.add_(1))
    ranks.gather = lambda mine: [mine, False]
    ranks.sum_gradients([p])
    assert p.grad is None
    ranks.gather = lambda mine: [mine, True]
    ranks.sum_gradients([p])
    assert torch.equal(p.grad, torch.ones(2))


RANK_SCRIPT = """
import sys, torch
sys.path[:0] = [{here!r}, {parts!r}]
import red, {module} as t
tiny, ranks = t.tiny.__wrapped__(), red.Ranks()
g, metrics = t.gradient(tiny, t.fake_groups(tiny, 4, seed=4)[ranks.rank::ranks.size], ranks)
if ranks.rank == 0:
    torch.save((g, metrics), sys.argv[1])
"""


def torchrun(*argv, timeout=200):
    """Two processes on this machine; what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks_give_the_gradient_of_one(tiny, tmp_path):
    """Two gloo processes with half of the groups each: the same gradient, lam and metrics as one, in float64."""
    script, here = tmp_path / "rank.py", Path(__file__)
    script.write_text(RANK_SCRIPT.format(here=str(HERE), parts=str(here.parent), module=here.stem))
    torchrun(script, tmp_path / "out.pt")
    got, metrics = torch.load(tmp_path / "out.pt", weights_only=False)
    wanted, alone = gradient(tiny, fake_groups(tiny, 4, seed=4))
    assert (got - wanted).norm() / wanted.norm() < 1e-9
    for name in alone:
        assert metrics[name] == pytest.approx(alone[name], rel=1e-9), name


def scripted(tiny, right, cut=False):
    """An engine that answers each prompt of a call with a group, right where the next row of `right` says so."""
    by_prompt = {tuple(x.prompt): x for x in tiny.items}

    def answer(prompt):
        gold = int(by_prompt[tuple(prompt)].problem.gold)
        group = [tiny.text.trace(f"\\boxed{{{(gold + 1 - good) % 10}}}") for good in next(right)]
        return [rapid.Rollout(prompt, ids[:-1] if cut else ids, [0.0] * (len(ids) - cut), 0.0, cut) for ids in group]
    return SimpleNamespace(push=lambda: None, tick=print, generate=lambda prompts, **_: [answer(p) for p in prompts])


def test_a_phase_deals_its_problems_into_updates(tiny):
    """Two updates of four of twelve problems: each group's verdicts and rewards, Lbar, the plan and the counts."""
    rng, queue, state = random.Random(2), data.Queue({"all": list(range(12))}, seed=0), red.State()
    rows = [[rng.randint(0, 1) for _ in range(4)] for _ in range(8)]
    batches, plan, metrics = red.sample_phase(tiny.cfg, scripted(tiny, iter(rows)), tiny.text, tiny.items, queue, state,
                                              red.Ranks())
    groups = sum(batches, [])
    assert [g.index for g in groups] == sum(plan, []) and len({g.index for g in groups}) == 8
    assert [g.correct for g in groups] == rows == [[r.reward for r in g.rollouts] for g in groups]
    assert metrics["verdict_correct"] == sum(map(sum, rows)) and metrics["responses"] == 32
    assert state.lbar == metrics["tokens"] / 32 == 4 and state.phase == 1


def test_a_right_answer_in_a_truncated_response_earns_nothing(tiny):
    for cut, reason, reward in ((False, "correct", 1.0), (True, "truncated", 0.0)):
        engine = scripted(tiny, iter([[1]]), cut)
        ((rollout, verdict),), = red.sample_and_judge(engine, tiny.text, tiny.items[:1], n=1, temperature=1.0,
                                                     max_new_tokens=8, seeds=[0])
        assert verdict.reason == reason and red.reward_of(rollout, verdict) == reward


# ======================================================================================================================
# red.py: the sampler
# ======================================================================================================================

def test_sampler_logps_equal_one_by_one_scoring(tiny):
    """Prompts of different length, finished rows dropped: every log-prob is that of the sequence alone."""
    engine = red.HFEngine(tiny.cfg, tiny.model, tiny.text)
    prompts = [x.prompt for x in tiny.items[:6]]
    assert len({len(p) for p in prompts}) > 1
    for temperature in (1.0, 0.7):
        groups = engine.generate(prompts, n=3, temperature=temperature, max_new_tokens=20, seeds=range(0, 600, 100))
        rollouts = sum(groups, [])
        assert len({len(r.response) for r in rollouts}) > 3 and {r.truncated for r in rollouts} == {True, False}
        for r in rollouts:
            assert r.truncated == (r.response[-1] != 1) and 1 not in r.response[:-1]
            with torch.no_grad():
                logp, _ = naive_logp(tiny.model, r.prompt, r.response, temperature)
            assert np.abs(np.array(r.mu) - logp.numpy()).max() < 1e-5


def test_a_row_samples_the_same_in_any_batch(tiny):
    prompts, seeds = [x.prompt for x in tiny.items], [1000 * i for i in range(12)]
    how = dict(n=2, temperature=1.0, max_new_tokens=16)
    wide = red.HFEngine(tiny.cfg, tiny.model, tiny.text).generate(prompts, seeds=seeds, **how)
    narrow = red.HFEngine(dataclasses.replace(tiny.cfg, sample_rows=4), tiny.model, tiny.text)
    turned = narrow.generate(prompts[::-1], seeds=seeds[::-1], **how)[::-1]
    assert [[r.response for r in g] for g in turned] == [[r.response for r in g] for g in wide]


def test_draw_follows_the_distribution():
    """Over a fine grid of uniforms each token comes up in proportion to softmax(logits / T), with that log-prob."""
    logits = torch.tensor([[1.0, -1.0, 0.5, -8.0]])
    for temperature in (1.0, 0.5):
        p, n = torch.softmax(logits[0].double() / temperature, -1), 100000
        token, logp = red.draw(logits.expand(n, -1), (torch.arange(n).double() + 0.5) / n, temperature)
        counts = torch.bincount(token, minlength=4).double() / n
        assert (counts - p).abs().max() < 2 / n + 1e-5
        assert (logp.double() - p.log()[token]).abs().max() < 1e-5
    assert red.draw(logits, torch.tensor([0.99]).double(), 0)[0].item() == 0     # greedy


def test_pass_at_k_against_enumeration():
    for n, c, k in itertools.product([5], range(6), range(1, 6)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert red.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


# ======================================================================================================================
# red.py: small runs
# ======================================================================================================================

SMALL = ("--preset builtin --train builtin --eval builtin --eval-limit 12 --prompts 4 --group-size 2 --updates 5 "
         "--updates-per-phase 2 --eval-every 2 --save-every 2 --samples 2 --max-new-tokens 24 --min-ess 0").split() + NO_POOL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the finished run `a` of SMALL."""
    path = tmp_path_factory.mktemp("runs")
    assert red.main(["--out", str(path / "a"), *SMALL]) == 0
    return path


def weights(path):
    from safetensors.torch import load_file
    return load_file(path / "model.safetensors" if (path / "model.safetensors").exists() else path / "model" / "model.safetensors")


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows_of(path):
    return [json.loads(line) for line in open(path / "metrics.jsonl")]


def equal_runs(a, b):
    """Weights, metrics (but for seconds) and responses of two finished runs, bit for bit."""
    strip = lambda rows: [{k: v for k, v in r.items() if "seconds" not in k} for r in rows]
    responses = [sorted(p.name for p in path.glob("responses-*")) for path in (a, b)]
    assert same_weights(weights(a), weights(b)) and strip(rows_of(a)) == strip(rows_of(b)) and responses[0] == responses[1]
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in responses[0])
    return True


def refusal(capsys, *argv):
    """The one line with which red.py refuses argv."""
    assert red.main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("red.py: ")
    return lines[0]


def start(*argv, **more):
    return subprocess.Popen([sys.executable, str(HERE / "red.py"), *map(str, argv)], stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **{"stdout": subprocess.PIPE, **more})


def test_a_run_leaves_what_the_readme_says(folder):
    """Every update once, evaluations at 0, every second update and the end, checkpoints between phases, on-policy
    weights of 1 at the start of each phase, responses that the checker judges as written, the model loadable."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    run, rows = folder / "a", rows_of(folder / "a")
    assert [r["update"] for r in rows if "eval" not in r] == [1, 2, 3, 4, 5]
    assert [r["update"] for r in rows if "eval" in r] == [0, 2, 4, 5]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["000004", "000005"]
    assert [r["update"] for r in rows if "phase" in r] == [1, 3, 5]
    for r in rows:
        if "phase" in r:
            assert r["max_abs_logw"] < 1e-4 and r["ess"] == pytest.approx(1, abs=1e-6)
    responses = [json.loads(line) for line in open(run / "responses-000005.jsonl")]
    assert len(responses) == 24
    for r in responses:
        assert r["truncated"] or checker.verify(r["response"], gold=r["gold"]).correct == r["correct"]
    final = [r for r in rows if "eval" in r][-1]
    assert final["mean"] == pytest.approx(np.mean([r["correct"] for r in responses]))
    assert red.run_settings(run)["prompts"] == 4 and (run / "curves.png").stat().st_size > 10000
    assert not same_weights(weights(run), weights(red.BASE))
    model, tokenizer = (x.from_pretrained(run / "model") for x in (AutoModelForCausalLM, AutoTokenizer))
    last = AutoModelForCausalLM.from_pretrained(run / "checkpoints/000005/model")
    ids = torch.tensor([tokenizer.encode("3-4x2=\\boxed{4}")])
    assert torch.equal(model(ids).logits, last(ids).logits) and tokenizer.decode(ids[0]) == "3-4x2=\\boxed{4}"


def test_resumed_run_equals_the_uninterrupted_one(folder, tmp_path):
    """What a kill leaves: an older checkpoint and rows, responses and a half-written checkpoint from after it."""
    shutil.copytree(folder / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "000005")
    shutil.rmtree(tmp_path / "b" / "model")
    (tmp_path / "b" / "checkpoints" / "tmp").mkdir()
    assert red.main(["--resume", str(tmp_path / "b")]) == 0
    assert equal_runs(tmp_path / "b", folder / "a")


def test_killed_at_random_moments_ends_with_the_same_weights(folder, tmp_path, request):
    """kill -9 while sampling, updating, evaluating or saving (3 times; 20 with --runslow), resume each time, also where
    no checkpoint exists: in the end the very run that was never interrupted."""
    argv = [*SMALL, "--updates", "12", "--save-every", "1", "--eval-every", "3", "--max-new-tokens", "40"]
    assert red.main(["--out", str(tmp_path / "a"), *argv]) == 0
    kills, rng = 20 if request.config.getoption("--runslow", default=False) else 3, np.random.default_rng(0)
    process = start("--out", tmp_path / "b", *argv)
    for _ in range(kills):
        for line in process.stdout:            # the moments count from the end of loading, which takes most of a start
            if line.startswith(("eval", "update")) or "resume" in line:
                break
        time.sleep(rng.random())
        process.kill()
        process.communicate()
        process = start(*(("--resume", tmp_path / "b") if (tmp_path / "b" / "config.json").exists()
                          else ("--out", tmp_path / "b", *argv)))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert equal_runs(tmp_path / "a", tmp_path / "b")


def test_a_run_without_a_checkpoint_starts_over(folder, tmp_path, capsys):
    """--resume and the first command both begin again, and what the first start wrote is gone."""
    for argv in (["--resume", str(tmp_path / "b")], ["--out", str(tmp_path / "b"), *SMALL]):
        shutil.copytree(folder / "a", tmp_path / "b", ignore=shutil.ignore_patterns("checkpoints", "model"))
        assert red.main(argv) == 0 and equal_runs(folder / "a", tmp_path / "b")
        shutil.rmtree(tmp_path / "b")


@pytest.mark.parametrize("damaged", ["trainer.pt", "model/model.safetensors", "sums.json"])
def test_a_damaged_checkpoint_falls_back(folder, tmp_path, capsys, damaged):
    """One flipped bit is enough. Where every checkpoint is damaged the line says how to go on."""
    shutil.copytree(folder / "a", tmp_path / "b")
    for name in ("000005", "000004"):
        content = bytearray((tmp_path / "b/checkpoints" / name / damaged).read_bytes())
        content[len(content) // 2] ^= 4
        (tmp_path / "b/checkpoints" / name / damaged).write_bytes(content)
        if name == "000005":
            assert red.main(["--resume", str(tmp_path / "b")]) == 0 and equal_runs(tmp_path / "b", folder / "a")
            assert "000005 cannot be read" in capsys.readouterr().out
            shutil.copytree(tmp_path / "b/checkpoints/000004", tmp_path / "b/checkpoints/000005", dirs_exist_ok=True)
            (tmp_path / "b/checkpoints/000005" / damaged).write_bytes(content)
    assert "no checkpoint that can be read; to start it over, delete" in refusal(capsys, "--resume", tmp_path / "b")


def test_a_signal_saves_after_the_phase_and_a_second_one_leaves_at_once(folder, tmp_path):
    """SIGTERM in a real process: exit 0 and the command that resumes, to the same weights. Two signals: exit 130."""
    for signals, code in (([signal.SIGTERM], 0), ([signal.SIGINT, signal.SIGTERM], 130)):
        process = start("--out", tmp_path / "b", *SMALL)
        for line in process.stdout:
            if line.startswith("eval builtin at update 2"):
                process.send_signal(signal.SIGSTOP)      # held, so that both arrive before it can answer the first
                for number in signals:
                    process.send_signal(number)
                process.send_signal(signal.SIGCONT)
                break
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == code
        if code == 0:
            assert f"python red.py --resume {tmp_path / 'b'}" in rest and not (tmp_path / "b" / "model").exists()
        assert red.main(["--resume", str(tmp_path / "b")]) == 0 and equal_runs(tmp_path / "b", folder / "a")
        shutil.rmtree(tmp_path / "b")


def test_a_disk_that_fills_up(folder, tmp_path):
    """A file-size limit stops the optimizer's file half way: one line, nothing half-written, and the run goes on."""
    import resource
    full = start("--out", tmp_path / "b", *SMALL,
                 preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (950_000, 950_000)))
    said, _ = full.communicate(timeout=120)
    assert full.returncode == 2 and "Traceback" not in said
    assert "checkpoints/000002" in said.splitlines()[-1] and "make room" in said.splitlines()[-1]
    assert not list((tmp_path / "b" / "checkpoints").iterdir())
    assert red.main(["--resume", str(tmp_path / "b")]) == 0 and equal_runs(tmp_path / "b", folder / "a")


def test_more_updates_and_other_memory_on_resume(folder, tmp_path, capsys):
    """Without a cool-down a run of 2 updates goes on to 4 as if 4 had been asked for; smaller micro-batches change
    rounding alone. A setting that changes the weights is refused by name."""
    flags = [*SMALL, "--cooldown", "0"]
    for name, updates in (("four", "4"), ("two", "2")):
        assert red.main(["--out", str(tmp_path / name), *flags, "--updates", updates]) == 0
    capsys.readouterr()
    assert "--seed: found 7, but" in refusal(capsys, "--resume", tmp_path / "two", "--seed", "7")
    assert red.main(["--resume", str(tmp_path / "two"), "--updates", "4", "--tokens-per-microbatch", "99"]) == 0
    a, b = weights(tmp_path / "four"), weights(tmp_path / "two")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    assert red.run_settings(tmp_path / "two")["tokens_per_microbatch"] == 99
    assert "cool-down" in refusal(capsys, "--resume", folder / "a", "--updates", "9", "--cooldown", "240")


def test_out_of_memory_names_the_flags(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("fake")
    monkeypatch.setattr(red, "draw", full)
    assert "lower --tokens-per-microbatch or --sample-rows" in refusal(capsys, "--out", tmp_path / "b", *SMALL)


def test_gradients_that_are_not_finite_change_nothing_and_stop_the_run(tmp_path, monkeypatch, capsys):
    accumulate = rapid.accumulate

    def poisoned(model, *args, **kw):
        metrics = accumulate(model, *args, **kw)
        next(model.parameters()).grad = torch.full_like(next(model.parameters()), math.nan)
        return metrics
    monkeypatch.setattr(rapid, "accumulate", poisoned)
    line = refusal(capsys, "--out", tmp_path / "b", *SMALL)
    assert "3 updates in a row were not finite" in line
    assert same_weights(weights(tmp_path / "b/checkpoints/000002"), weights(red.BASE))


def test_eq5_wild_learning_rate_shortens_phases(tmp_path, monkeypatch):
    """At 3,000 times the learning rate the weights degenerate: phases end early, and no problem is lost or used twice.
    """
    argv = [*SMALL, *("--updates-per-phase 8 --updates 16 --eval-every 99 --save-every 99 --prompts 8 --warmup 0 "
                      "--cooldown 0 --min-ess 0.5 --limit 64 --algo rapid --adv-norm none").split()]
    monkeypatch.setattr(red, "judge", lambda text, item, r: checker.Verdict(len(r.response) % 2 == 0, "correct", ""))
    taken, phases, take, give = [], {}, data.Queue.take, data.Queue.give_back
    monkeypatch.setattr(data.Queue, "take", lambda self, *a: taken.append(take(self, *a)) or taken[-1])
    monkeypatch.setattr(data.Queue, "give_back", lambda self, *a: give(self, *a) or taken.append([-i for i in a[1]]))
    for lr in ("1e-5", "3e-2"):
        taken.clear()
        assert red.main([*argv, "--lr", lr, "--out", str(tmp_path / lr)]) == 0
        rows = [r for r in rows_of(tmp_path / lr) if "eval" not in r]
        phases[lr] = sum("phase" in r for r in rows)
        assert all(r["ess"] < 0.5 for r in rows if "updates_dropped" in r)
        used = Counter(abs(i) for part in taken for i in part)
        back = Counter(-i for part in taken for i in part if i < 0)
        assert sum(used.values()) - 2 * sum(back.values()) == 8 * 16 or lr == "3e-2"
    assert phases["1e-5"] == 2 < phases["3e-2"]


def test_two_ranks_make_the_run_of_one_and_resume_each_other(folder, tmp_path):
    """torchrun with two processes: the samples, rows and weights of one. Its checkpoint resumes on one rank, and one
    rank's on two: Adam's moments are split over the ranks while they train and stand together in a checkpoint."""
    def check(path):
        a, b = weights(folder / "a"), weights(path)
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-4
        for one, two in zip(rows_of(folder / "a"), rows_of(path), strict=True):
            assert one["update"] == two["update"] and one.get("tokens") == two.get("tokens")
            assert one.get("mean") == two.get("mean")
        one, two = (torch.load(p / "checkpoints/000005/trainer.pt", weights_only=True)["optimizer"]["state"]
                    for p in (folder / "a", path))
        assert one.keys() == two.keys()
        for i in one:
            assert one[i]["step"] == two[i]["step"] == 5
            assert (one[i]["exp_avg"] - two[i]["exp_avg"]).norm() < 1e-3 * one[i]["exp_avg"].norm() + 1e-9
    torchrun(HERE / "red.py", "--out", tmp_path / "b", *SMALL)
    check(tmp_path / "b")
    shutil.copytree(folder / "a", tmp_path / "c")
    for path in (tmp_path / "b", tmp_path / "c"):
        shutil.rmtree(path / "checkpoints" / "000005")
        shutil.rmtree(path / "model")
    assert red.main(["--resume", str(tmp_path / "b")]) == 0
    check(tmp_path / "b")
    torchrun(HERE / "red.py", "--resume", tmp_path / "c")
    check(tmp_path / "c")


def test_sft_follows_the_traces_only(tmp_path):
    assert red.main(["--out", str(tmp_path / "s"), *SMALL, "--algo", "sft", "--updates", "30", "--cooldown", "0"]) == 0
    rows = [r for r in rows_of(tmp_path / "s") if "eval" not in r]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and "reward" not in rows[0] and rows[0]["traces"] == 4


@pytest.mark.parametrize("algo", ["rapid", "grpo"])
def test_other_algorithms_run_without_traces(tmp_path, algo):
    assert red.main(["--out", str(tmp_path / "r"), *SMALL, "--algo", algo]) == 0
    rows = [r for r in rows_of(tmp_path / "r") if "eval" not in r]
    assert len(rows) == 5 and all("lam" not in r for r in rows)


def test_evaluation_alone_of_a_finished_run(folder, tmp_path, capsys):
    """mean@4 and pass@4 with their standard errors over problems, from the responses that were written."""
    argv = ["--eval-only", "--model", folder / "a", "--eval", "builtin@4", "--eval-limit", "12", "--out", tmp_path / "e"]
    assert red.main([str(a) for a in argv]) == 0
    row, = rows_of(tmp_path / "e")
    responses = [json.loads(line) for line in open(tmp_path / "e" / "responses.jsonl")]
    right = np.array([r["correct"] for r in responses]).reshape(12, 4)
    assert row["samples"] == 4 and "pass@4" in capsys.readouterr().out
    assert row["pass"] == pytest.approx(right.any(1).mean()) and row["mean"] == pytest.approx(right.mean())
    assert row["mean_se"] == pytest.approx(right.mean(1).std(ddof=1) / 12 ** 0.5)


# ======================================================================================================================
# red.py: refusals
# ======================================================================================================================

@pytest.mark.parametrize("argv, said", [
    ("--group-size 1", "--group-size: found 1, allowed is 2 "),
    ("--updates-per-phase 0", "--updates-per-phase: found 0, allowed is 1 "),
    ("--algo ppo", "--algo: invalid choice: 'ppo' (choose from"),
    ("--off-weight much", "--off-weight: found much, allowed is 0 or more, or dynamic"),
    ("--off-weight 1e", "--off-weight: found 1e"),
    ("--shift-gamma nan", "--shift-gamma: found nan"),
    ("--preset huge", "--preset: invalid choice: 'huge'"),
    ("--updates-per-fase 4", "no such flag; the nearest is ['--updates-per-phase']"),
    ("--model M", "--train: missing"),
    ("--eval-only", "--eval-only: needs --model"),
    ("--resume nowhere", "--resume: found no run in nowhere"),
    ("--model M --train none.jsonl", "none.jsonl: found no such file"),
    ("--model M --train empty.jsonl", "empty.jsonl"),
    ("--model M --train bad.jsonl", "bad.jsonl:2"),
    ("--model M --train noanswer.jsonl", "no answer in 1 rows"),
    ("--model M --train good.jsonl --max-new-tokens 48 --algo sft", "no problem of good.jsonl has a trace"),
    ("--model M --train good.jsonl --max-new-tokens 120", "every prompt is too long (first good.jsonl:1"),
    ("--model M --train good.jsonl", "--max-new-tokens: found 3072, allowed is below the context, 128"),
    ("--model M --train good.jsonl --max-new-tokens 48 --eval good.jsonl", "leaves 0 problems that are not in the training data"),
    ("--model M --train good.jsonl --max-new-tokens 48 --eval builtin@0", "0 samples each"),
    ("--model notokenizer --train good.jsonl", "notokenizer could not be loaded"),
    ("--model emptydir --train good.jsonl", "has no config.json"),
    ("--device cuda", "torch sees no GPU"),
])
def test_refusals_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1+1=", "gold": "2"}\n{"prompt": \n')
    (tmp_path / "noanswer.jsonl").write_text('{"prompt": "1+1=", "gold": ""}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "1+1+3+4+5=", "gold": "4", "traces": ["\\\\boxed{3}"]}\n')
    (tmp_path / "emptydir").mkdir()
    shutil.copytree(red.BASE, tmp_path / "notokenizer", ignore=shutil.ignore_patterns("tokenizer*", "chat*"))
    before = sorted(tmp_path.rglob("*"))
    assert said in refusal(capsys, *[str(red.BASE) if a == "M" else a for a in argv.split()])
    assert sorted(tmp_path.rglob("*")) == before


def test_run_directories_are_guarded(folder, tmp_path, capsys, monkeypatch):
    """A taken directory, a second process, a place that cannot be written, a copy without assets/base."""
    assert "already holds a run" in refusal(capsys, *SMALL, "--out", folder / "a")
    run = red.Run(red.Config(out=str(tmp_path / "r")), red.Ranks(), print)
    assert "another process trains" in refusal(capsys, *SMALL, "--out", tmp_path / "r")
    run.lock.close()
    (tmp_path / "file").write_text("")
    assert "file" in refusal(capsys, *SMALL, "--out", tmp_path / "file" / "x")
    monkeypatch.setattr(red, "BASE", tmp_path / "base")
    assert "assets/bench.py --make-base" in refusal(capsys, *SMALL, "--out", tmp_path / "n")


def test_the_preset_belongs_to_the_built_in_model_alone(folder):
    lr = lambda *argv: red.parse([str(a) for a in argv])[0].lr
    assert lr() == lr("--model", folder / "a") == red.PRESETS["builtin"]["lr"]
    assert lr("--model", "m", "--train", "builtin") == lr("--model", "m", "--train", "f", "--eval", "builtin") == 1e-6
    assert lr("--lr", "3") == 3 and lr("--preset", "builtin", "--model", "m") == red.PRESETS["builtin"]["lr"]


def test_evaluation_sets_of_one_name_stay_apart(tmp_path):
    for folder in ("x", "y@2", "z@w"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.jsonl").write_text('{"prompt": "1+1=", "gold": "2"}\n')
    evals = f"{tmp_path}/x/t.jsonl@3, {tmp_path}/y@2/t.jsonl , {tmp_path}/z@w/t.jsonl@5,{tmp_path}/x/t.jsonl@7"
    _, tests = red.load_problems(red.Config(eval=evals, eval_only=True), print)
    assert [k for k, _ in tests.values()] == [3, 1, 5, 7] and len(tests) == 4


# ======================================================================================================================
# The files themselves and the README
# ======================================================================================================================

def test_nothing_heavy_at_import():
    code = "import sys, red; print([m for m in ('vllm', 'matplotlib', 'datasets', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["verify", "rapid", "data"])
def test_each_file_alone_in_an_empty_folder(tmp_path, name):
    """Copied alone it imports, and the examples in its docstrings print what they say."""
    shutil.copy(HERE / f"{name}.py", tmp_path)
    code = f"import doctest, {name}; print(doctest.testmod({name}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout.startswith("TestResults(failed=0"), done.stdout + done.stderr


def test_docstring_examples_of_red():
    import doctest
    assert doctest.testmod(red).attempted > 0 and doctest.testmod(red).failed == 0


def test_every_setting_has_a_reader():
    source = (HERE / "red.py").read_text()
    for f in dataclasses.fields(red.Config):
        assert f.metadata["help"] and re.search(rf"\bcfg\.{f.name}\b|\"{f.name}\"", source), f"{f.name} is read nowhere"
    assert set(itertools.chain(*red.PRESETS.values())) <= set(red.Config.__dataclass_fields__)


def pytest_addoption(parser):
    """A test file has no options of its own under plain pytest, so `python test_red.py --runslow` starts pytest."""
    parser.addoption("--runslow", action="store_true", help="the long versions: 20 kills, 10,000 mutated rows, 2 GB")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]], plugins=[sys.modules[__name__]]))
