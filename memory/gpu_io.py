"""Files read into and written from GPU memory, through KvikIO.

That is GPUDirect Storage where the driver has it, and otherwise KvikIO's POSIX mode, which copies
through host memory. KvikIO comes with the extra ``nvme`` and is loaded when it is first needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slideformer.graph.errors import DeviceError


def direct_storage() -> bool:
    """Whether there is GPUDirect Storage here: KvikIO loads and finds the driver for it."""
    try:
        import kvikio.cufile_driver
    except (ImportError, RuntimeError):
        return False
    return bool(kvikio.cufile_driver.get("is_gds_available"))


class GpuFiles:
    """Open files; buffers are uint8 in GPU memory with ``__cuda_array_interface__``.

    Raises `DeviceError` if KvikIO is not installed or does not load.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            import kvikio
        # A library that is missing is a RuntimeError of its own there, not an ImportError.
        except (ImportError, RuntimeError) as error:
            raise DeviceError(
                f"GPU memory is read from and written to NVMe through KvikIO, which does not load "
                f"({error}); pip install 'slideformer[nvme]'"
            ) from error
        self.mode = "GPUDirect Storage" if direct_storage() else "KvikIO's POSIX mode"
        self._files = [kvikio.CuFile(path, "r+") for path in paths]

    def read(self, file: int, offset: int, into: Any) -> int:
        """Fill a buffer from an offset of a file on; returns the bytes that were there."""
        return int(self._files[file].pread(into, file_offset=offset).get())

    def write(self, file: int, offset: int, source: Any) -> int:
        """Write a buffer to an offset of a file; returns the bytes written."""
        return int(self._files[file].pwrite(source, file_offset=offset).get())

    def close(self) -> None:
        """Close the files; nothing may be in flight."""
        for file in self._files:
            file.close()
