"""Every error deisa-ray raises, each also being the standard error a caller would catch.

::

    DeisaError
    ├── ConfigurationError (ValueError)        a setting or an environment variable makes no sense
    │   ├── ConfigurationTypeError (TypeError)     an argument that says who a bridge is has the wrong type
    │   ├── ConfigError (RuntimeError)             a variable that deisa-ray 0.1.8 reads has a value that it refuses
    │   └── UntestedDaskError (ImportError)        the installed Dask is not one that was tested
    ├── LayoutError (ValueError)               the bridges' descriptions do not make whole arrays
    │   ├── DescriptionError                       one bridge's own description is malformed
    │   │   └── DescriptionTypeError (TypeError)       something in it has the wrong type
    │   ├── DescriptionMismatchError               two bridges describe one array differently
    │   ├── OverlapError                           two chunks cover the same elements
    │   ├── HoleError                              elements that no chunk covers
    │   ├── BridgeIdError                          ids are not exactly 0..world_size-1
    │   └── WorldSizeError                         bridges disagree on how many they are
    ├── ContractError (ValueError)             a rank sent what it did not announce
    │   ├── UnknownArrayError (KeyError)
    │   ├── ChunkIndexError (IndexError)
    │   ├── ChunkShapeError
    │   ├── ChunkDtypeError (TypeError)
    │   ├── DeviceMemoryError (TypeError)          the chunk lies on a GPU
    │   ├── TimestepError                          older than one already sent, or no integer
    │   ├── PhysicalTimeError                      no finite number, or not the same in all bridges
    │   ├── DuplicateChunkError
    │   └── IncompleteTimestepError                some bridges skipped a timestep that others sent
    ├── ClosedError (RuntimeError)             the bridge or the analytics was closed before
    ├── ForkedProcessError (RuntimeError)      a forked child used what belongs to its parent
    ├── RegistrationError (ValueError)         a callback or its windows make no sense
    │   ├── WindowError
    │   ├── TriggerError                           what a trigger returned is neither true nor false
    │   └── NoCallbacksError (RuntimeError)
    ├── LabelError (ValueError)                arrays do not fit together under their labels
    ├── MissingPackageError (ImportError)      an optional package is needed, and not installed
    ├── TaskError (RuntimeError)               a task raised what cannot be carried to the analytics
    │   └── NotPicklableError (TypeError)          something that a task holds or returns cannot be pickled
    ├── UnsupportedValueError (TypeError)      a message cannot carry a value, such as an attribute
    ├── FeedbackError (ValueError)             what is set for the simulation, or asked of it, makes no sense
    │   ├── FeedbackTypeError (TypeError)          a key is no text, or a timestep no integer
    │   ├── FeedbackSizeError (MemoryError)        a value, or the number of keys, exceeds what a node keeps
    │   └── FeedbackDroppedError (LookupError)     a value was set and is no longer kept
    ├── MemoryBoundError (MemoryError)         the slots would not fit into a node
    ├── KeptArraysError (MemoryError)          every slot holds an array that the analytics keeps
    ├── DescriptorLimitError (OSError)         the bridges of a node take more open files than it may have
    ├── WaitTimeoutError (TimeoutError)        a wait ran out; the message names who is missing
    │   ├── NoAnalyticsError (ConnectionError)     no agent answers on this host
    │   └── NoFreeCpusError                        others hold the CPUs that a computation needs
    ├── StoreFullError (MemoryError)           Ray has no room for results, in memory or on disk
    ├── SaveError (OSError)                    a file cannot be written; the message names it
    │   ├── SaveFormatError (ValueError)           the path holds something else, or says no format
    │   ├── SaveMismatchError (ValueError)         what is appended is not what is stored, or has no name or timestep
    │   ├── SaveOrderError (ValueError)            the same run has saved a later timestep
    │   └── SaveConflictError                      another process writes to the same path
    ├── ReplayError (OSError)                  what is to be replayed cannot be read, or has no timesteps
    ├── SessionError (RuntimeError)
    │   ├── SessionInUseError                      another analytics has this session
    │   └── SessionEndedError                      the memory of the chunk is gone with its session
    ├── ClusterError (ConnectionError)         Ray cannot be reached, or refuses this process
    ├── PeerError (ConnectionError)
    │   ├── ProtocolError                          bytes that are no message, or one out of place
    │   └── PeerIdentityError (PermissionError)    the other end belongs to another user
    └── LostError (ConnectionError)            a party that was there has gone
        ├── BridgeLostError
        ├── AgentLostError
        ├── AnalyticsLostError
        │   └── AnalyticsStoppedError              it has ended the run by its own wish: Deisa.close()
        └── ComputationLostError                   the processes or nodes that computed something
"""

from __future__ import annotations

from collections.abc import Iterator

MEMORY_MONITOR = (
    "Ray's memory monitor ends processes of a node whose memory is nearly full, whoever fills it: the simulation and "
    "its chunk memory count, too. RAY_memory_usage_threshold (0.95) says from which part on, and "
    "RAY_memory_monitor_refresh_ms=0 switches it off; `ray start` reads both"
)


class DeisaError(Exception):
    """Base of every error that deisa-ray raises on purpose."""

    def __str__(self) -> str:  # KeyError would show the message in quotes
        return str(self.args[0]) if self.args else ""


class ConfigurationError(DeisaError, ValueError):
    """A setting or an environment variable has a value that makes no sense."""


class ConfigurationTypeError(ConfigurationError, TypeError):
    """An argument that says who a bridge is, such as its communicator, has the wrong type."""


class ConfigError(ConfigurationError, RuntimeError):
    """A variable that deisa-ray 0.1.8 reads, and this one does not need, has a value that 0.1.8 refuses."""


class UntestedDaskError(ConfigurationError, ImportError):
    """The installed release of Dask is not one that this deisa-ray was tested with."""


class LayoutError(DeisaError, ValueError):
    """The bridges' descriptions do not make whole arrays."""


class DescriptionError(LayoutError):
    """One bridge's description of an array is malformed."""


class DescriptionTypeError(DescriptionError, TypeError):
    """Something in a bridge's description has the wrong type: a shape that is no tuple of integers, for example."""


class DescriptionMismatchError(LayoutError):
    """Two bridges describe the same array differently."""


class OverlapError(LayoutError):
    """Two chunks cover the same elements of an array."""


class HoleError(LayoutError):
    """Some elements of an array belong to no chunk."""


class BridgeIdError(LayoutError):
    """The bridge ids are not exactly ``0 .. world_size - 1``."""


class WorldSizeError(LayoutError):
    """The bridges disagree on how many they are."""


class ContractError(DeisaError, ValueError):
    """A rank sent something other than it announced."""

    @property
    def message(self) -> str:
        """The text, as deisa-ray 0.1.8 calls it."""
        return str(self)


class UnknownArrayError(ContractError, KeyError):
    """The bridge's metadata has no array of that name."""


class ChunkIndexError(ContractError, IndexError):
    """The bridge has no chunk of that index, or has several and none was named."""


class ChunkShapeError(ContractError):
    """The chunk has another shape than announced."""


class ChunkDtypeError(ContractError, TypeError):
    """The chunk has another dtype than announced."""


class DeviceMemoryError(ContractError, TypeError):
    """The chunk lies in the memory of an accelerator."""


class TimestepError(ContractError):
    """A timestep is older than one already sent, or is not an integer."""


class PhysicalTimeError(ContractError):
    """The physical time of a timestep is no finite number, or bridges give different ones."""


class DuplicateChunkError(ContractError):
    """The same chunk was sent twice for one timestep."""


class IncompleteTimestepError(ContractError):
    """Some bridges skipped an array at a timestep at which others sent it."""


class ClosedError(DeisaError, RuntimeError):
    """The bridge or the analytics has been closed."""


class ForkedProcessError(DeisaError, RuntimeError):
    """A child made by ``fork`` used the bridge, or the analytics, of its parent."""


class RegistrationError(DeisaError, ValueError):
    """A callback or its windows make no sense."""


class WindowError(RegistrationError):
    """A window's name or size is invalid."""


class TriggerError(RegistrationError):
    """A trigger returned something that is neither true nor false."""


class NoCallbacksError(RegistrationError, RuntimeError):
    """``execute_callbacks`` was called with no callback registered."""


class LabelError(DeisaError, ValueError):
    """Arrays do not fit together under their labels."""


class MissingPackageError(DeisaError, ImportError):
    """What was asked for needs a package that is not installed; the message names it."""


class TaskError(DeisaError, RuntimeError):
    """A task raised an exception that cannot be carried to the analytics; the text is that of the exception."""


class NotPicklableError(TaskError, TypeError):
    """Something that a task holds or returns cannot be pickled, so it cannot go to or from a worker process."""


class UnsupportedValueError(DeisaError, TypeError):
    """A message cannot carry a value: it is of another type than those that it can be, or too large."""


class FeedbackError(DeisaError, ValueError):
    """What the analytics sets for the simulation, or what a bridge asks of it, makes no sense."""


class FeedbackTypeError(FeedbackError, TypeError):
    """A key is not a text, or a timestep not an integer."""


class FeedbackSizeError(FeedbackError, MemoryError):
    """A value is larger than what a node keeps, or there are too many keys."""


class FeedbackDroppedError(FeedbackError, LookupError):
    """The values of a key are no longer kept for a timestep; one may have been set."""


class MemoryBoundError(DeisaError, MemoryError):
    """The chunk memory that the run needs would not fit into a node."""


class KeptArraysError(DeisaError, MemoryError):
    """The analytics keeps so many arrays that no slot is left for the simulation, and nothing more can come."""


class DescriptorLimitError(DeisaError, OSError):
    """The bridges of a node take more open files than its agent may have."""


class WaitTimeoutError(DeisaError, TimeoutError):
    """A wait ran out of time; the message names what was missing."""


class NoAnalyticsError(WaitTimeoutError, ConnectionError):
    """No agent of the session answers on this host."""


class NoFreeCpusError(WaitTimeoutError):
    """Others have held every CPU of a node for too long."""


class StoreFullError(DeisaError, MemoryError):
    """Ray's object store, or the disk that it writes to when it is full, has no room for a result."""


class SaveError(DeisaError, OSError):
    """A file could not be written: the disk is full, or the path cannot be used."""


class SaveFormatError(SaveError, ValueError):
    """A path to save to holds something else, or says no format that is known."""


class SaveMismatchError(SaveError, ValueError):
    """What is to be saved is not what is stored at the path, or lacks a name or a timestep."""


class SaveOrderError(SaveError, ValueError):
    """A timestep is older than one that the same run has saved."""


class SaveConflictError(SaveError):
    """Another process writes to the path."""


class ReplayError(DeisaError, OSError):
    """What is to be replayed cannot be read, or is nothing that has timesteps."""


class SessionError(DeisaError, RuntimeError):
    """Something is wrong with the session as a whole."""


class SessionInUseError(SessionError):
    """Another analytics process already has a session of this name."""


class SessionEndedError(SessionError):
    """The chunk memory is gone because its session has ended."""


class ClusterError(DeisaError, ConnectionError):
    """The Ray cluster cannot be reached, or refuses this process."""


class PeerError(DeisaError, ConnectionError):
    """The other end of a connection does not behave."""


class ProtocolError(PeerError):
    """Received bytes are no message, or a message that is out of place."""


class PeerIdentityError(PeerError, PermissionError):
    """The other end of a connection belongs to another user."""


class LostError(DeisaError, ConnectionError):
    """A party that was there has gone."""


class BridgeLostError(LostError):
    """A rank ended without closing its bridge."""


class AgentLostError(LostError):
    """The agent of a node has gone."""


class AnalyticsLostError(LostError):
    """The analytics has ended or stopped answering."""


class AnalyticsStoppedError(AnalyticsLostError):
    """The analytics has ended the run by its own wish, with ``Deisa.close()``."""


class ComputationLostError(LostError):
    """The processes that computed something, or the nodes that held what they had computed, have gone."""


def cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Walk from an exception to what caused it, or what was being handled when it was raised."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def named_error(kind: str, message: str) -> DeisaError:
    """Build the error whose class is called `kind`, as received from another process."""
    candidate = globals().get(kind)
    if isinstance(candidate, type) and issubclass(candidate, DeisaError):
        return candidate(message)
    return DeisaError(message)
