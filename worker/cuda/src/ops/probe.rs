//! For [`check`](crate::check), which compares single ops: what lies in rows, set and read. Not part of a step.

use super::{CudaOps, DeviceRows, DeviceTable, device_error};
use crate::args::ElementType;
use crate::driver::Driver;
use baton_model::{KvDtype, KvGeometry, OpResult};

impl<D: Driver> CudaOps<D> {
    pub(crate) fn geometry(&self, block_size: usize) -> KvGeometry {
        KvGeometry {
            layers: self.layers,
            kv_heads: self.slices.kv_heads.len(),
            head_dim: self.program.head_dim,
            block_size,
            dtype: match self.program.element {
                ElementType::F32 => KvDtype::F32,
                ElementType::F16 => KvDtype::F16,
                ElementType::Bf16 => KvDtype::Bf16,
            },
        }
    }

    pub(crate) fn set_rows(
        &mut self,
        to: &mut DeviceRows,
        bytes: &[u8],
        rows: usize,
        element: ElementType,
    ) -> OpResult {
        to.rows = rows;
        to.element = element;
        self.on_device(|this| this.driver.upload(to.address, bytes))
    }

    /// Runs what is pending first.
    pub(crate) fn get_rows(&mut self, from: &DeviceRows) -> OpResult<(Vec<u8>, ElementType)> {
        self.run()?;
        let mut bytes = vec![0; from.rows * from.width * from.element.bytes()];
        self.on_device(|this| this.driver.download(from.address, &mut bytes))?;
        Ok((bytes, from.element))
    }

    /// Runs what is pending and waits for it.
    pub(crate) fn finish(&mut self) -> OpResult {
        self.run()?;
        self.on_device(|this| this.driver.synchronize())
    }

    pub(crate) fn free_rows(&mut self, rows: DeviceRows) {
        self.driver.free(rows.address);
    }

    pub(crate) fn table_of(&mut self, bytes: &[u8], element: ElementType) -> OpResult<DeviceTable> {
        let address = self.driver.allocate(bytes.len()).map_err(device_error)?;
        self.driver.upload(address, bytes).map_err(device_error)?;
        Ok(DeviceTable { address, element })
    }
}
