"""What a training run records: figures in the optimizer's state, and a run folder on the disk.

`watch` wraps an optimizer so that its state says what it did; `Recorder` keeps of a run what
`jaxgrad.diagnosis.diagnose_run` needs, in a folder of bounded size; `load_recording` reads it.
"""

from jaxgrad.monitor.recorder import Recorder as Recorder
from jaxgrad.monitor.recording import Recording as Recording
from jaxgrad.monitor.recording import load_recording as load_recording
from jaxgrad.monitor.watching import Figures as Figures
from jaxgrad.monitor.watching import WatchState as WatchState
from jaxgrad.monitor.watching import leading_clips as leading_clips
from jaxgrad.monitor.watching import watch as watch
