"""Choosing how to quantise by what the whole network then answers.

    choices.py      what is open to choice, and what was decided with which effect
    judge.py        quantised candidates on calibration images kept aside, against float
    search.py       equalisation, rounding, bias correction, each kept only if the judge agrees
    sensitivity.py  what each layer costs, and which must stay float to keep within a limit

Local error misleads: picking ranges or factors by each layer's own error improved every layer of DINOv2-S and
made the network 3 dB worse. It imports the stages, as `pipeline` does.
"""
