"""Schedules of local noising times: fixed curves, the learned convex class, inversion, and files."""

from fastasync.schedule.base import Schedule, SchedulePoint, check_monotone, kinetic_energy
from fastasync.schedule.convex import ROLES, ConvexSchedule
from fastasync.schedule.fixed import OffsetSchedule, PowerSchedule, TableSchedule, cascade, offset, power, synchronous
from fastasync.schedule.io import load_schedule, named_schedule, save_schedule, schedule_from_json

__all__ = [
    "ROLES",
    "ConvexSchedule",
    "OffsetSchedule",
    "PowerSchedule",
    "Schedule",
    "SchedulePoint",
    "TableSchedule",
    "cascade",
    "check_monotone",
    "kinetic_energy",
    "load_schedule",
    "named_schedule",
    "offset",
    "power",
    "save_schedule",
    "schedule_from_json",
    "synchronous",
]
