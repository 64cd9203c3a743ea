"""Judges: who answers questions about images, and how the answers are kept.

In: questions (texts and images). Out: answers (numbers or a choice, or a status that says why there are none). A judge
is an OpenAI-compatible endpoint, a local vision-language model, a program, or a file of recorded answers.
`session.JudgeSession` asks it: each answer is written to judge.jsonl at once, an interrupted run continues without
asking twice, and a run never costs more than --max-cost.
Read protocol.py first (the contract), then session.py.
"""
