"""What KubeAI shows on a terminal: log lines for people, and a table of Models below them.

:mod:`.screen` owns the terminal of ``kubeai local``; :mod:`.models` draws the table, which ``kubeai
top`` shows as well. rich is imported only when a table is drawn.
"""
