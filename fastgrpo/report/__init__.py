"""What a run looks like: `curves.png`, and one HTML page of everything in its directory."""

from .curves import curves_figure as curves_figure
from .curves import save_curves as save_curves
from .page import write_report as write_report
