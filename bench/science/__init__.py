"""The study of schedules: one protocol (PROTOCOL.md), a resumable list of runs, one module for each question."""
