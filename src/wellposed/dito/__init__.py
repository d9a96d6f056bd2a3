"""dito: token reduction that matches what a module puts out, taken from an earlier step (arXiv 2605.22011).

Read in this order: ``matching`` (pairs, reduce, recover), ``schedule`` (when to match), ``config`` (the settings),
``geometry`` (where tokens sit), ``attention`` (queries of some tokens, keys of all), ``adapters`` (the hosts' blocks),
``hooks`` (what runs inside a diffusers model), ``baselines`` (what it replaces), ``forecast`` and ``calibration`` (what
to expect, and what to choose).
"""
