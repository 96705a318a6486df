//! The layers of one image: those that are here are used, the others come, several at a time, and all together become an image.

use std::fs::File;

use caisson_layer_converter::protocol;
use futures::{StreamExt, TryStreamExt, stream};
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

use crate::{
    ImageError,
    composition::{Composed, Recipe},
    conversion::{self, Layer, too_large},
    digest::Digest,
    layers::{Held, LayerRecord},
    pull::Pull,
    store::failed,
    transfer::{self, CHANNEL_CHUNKS},
};

/// Layers of one pull that come and are converted at the same time.
const PARALLEL_LAYERS: usize = 3;

impl Pull {
    /// Keeps layers from being collected while this pull counts on them.
    pub(crate) fn hold(&self, layers: &[Layer]) -> Vec<Held> {
        let store = self.puller.store.layers();
        layers
            .iter()
            .map(|layer| store.hold(&layer.blob.digest))
            .collect()
    }

    /// Whether the content of an image is here, listed or not.
    pub(crate) async fn content(&self, id: &str) -> Result<bool, ImageError> {
        let id = id.to_owned();
        self.blocking("looking for content", move |store| {
            Ok(store.content(&id).is_some())
        })
        .await
    }

    /// Gets the layers that are missing, and composes the image. The layers are held.
    pub(crate) async fn compose(&self, layers: &[Layer]) -> Result<Composed, ImageError> {
        let records = stream::iter(layers.to_vec())
            .map(|layer| async move { self.layer(&layer).await })
            .buffered(PARALLEL_LAYERS)
            .try_collect::<Vec<_>>();
        self.check_sum(layers, &records.await?)?;
        let digests: Vec<Digest> = layers.iter().map(|layer| layer.blob.digest.clone()).collect();
        let recipe_layers = digests.iter().map(|digest| digest.hex().to_owned()).collect();
        let (metadata, output) = self.file().await?;
        let opened = self.blocking("opening layers", move |store| {
            let open = |digest: Digest| store.layers().file(&digest).map(|file| (digest, file));
            digests.into_iter().map(open).collect::<Result<Vec<_>, _>>()
        });
        let composed = self.puller.converters.compose(&opened.await?, &output).await;
        let protocol::Composed { bytes, verity, .. } =
            composed.map_err(|failure| self.conversion_error(failure))?;
        Ok(Composed {
            metadata,
            recipe: Recipe::new(bytes, verity, recipe_layers),
        })
    }

    /// A layer, from here or from elsewhere.
    async fn layer(&self, layer: &Layer) -> Result<LayerRecord, ImageError> {
        let key = (
            self.reference.registry().to_owned(),
            // Apart from the ids of images: a manifest may name one digest as both.
            format!("layer {}", layer.blob.digest),
        );
        let _alone = self.puller.conversions.lock(&key).await;
        let digest = layer.blob.digest.clone();
        let known = self
            .blocking("looking for a layer", move |store| {
                Ok(store.layers().find(&digest))
            })
            .await?;
        match known {
            Some(record) if record.diff_id == layer.diff_id.to_string() => Ok(record),
            // As if it had been converted now.
            Some(record) => Err(self.refused(format!(
                "layer {} has the diff id {} instead of {}",
                layer.blob.digest, record.diff_id, layer.diff_id
            ))),
            None => self.fetch_layer(layer).await,
        }
    }

    async fn fetch_layer(&self, layer: &Layer) -> Result<LayerRecord, ImageError> {
        let (file, output) = self.file().await?;
        let (sink, feed) = mpsc::channel(CHANNEL_CHUNKS);
        let (converted, downloaded) = tokio::join!(
            self.puller.converters.convert(layer, feed, &output),
            transfer::download(&self.sources, &layer.blob, sink)
        );
        let converted = match (converted, downloaded) {
            (Ok(converted), Ok(())) => converted,
            // A refusal of content is the cause of everything after it; a cut is the consequence of the download's end.
            (Err(conversion::Failure::Cut) | Ok(_), Err(transfer::Failure::Registry(error))) => {
                return Err(self.registry_error(error));
            }
            (Err(failure), _) => return Err(self.conversion_error(failure)),
            (Ok(_), Err(transfer::Failure::ConverterGone)) => {
                return Err(ImageError::Interrupted("a conversion"));
            }
        };
        let (digest, record) = (
            layer.blob.digest.clone(),
            LayerRecord::new(&layer.diff_id, converted),
        );
        tracing::debug!(layer = %digest, bytes = record.bytes, "layer.converted");
        self.blocking("storing a layer", move |store| {
            store.layers().put(&digest, &record, file, store.new_file()?)?;
            Ok(record)
        })
        .await
    }

    /// Each layer was within the limit; together they have to be, too.
    fn check_sum(&self, layers: &[Layer], records: &[LayerRecord]) -> Result<(), ImageError> {
        let max = self.puller.config.max_image_bytes;
        let mut sum = 0u64;
        for (layer, record) in layers.iter().zip(records) {
            sum = sum.saturating_add(record.uncompressed_bytes);
            if sum > max {
                return Err(self.refused(too_large(max, &layer.blob.digest)));
            }
        }
        Ok(())
    }

    /// A file that is gone when the first of the two is dropped without being placed, and a handle to write to it.
    async fn file(&self) -> Result<(NamedTempFile, File), ImageError> {
        self.blocking("making a file", |store| {
            let temporary = store.new_file()?;
            let output = temporary.as_file().try_clone();
            let output = output.map_err(|source| failed("open", temporary.path(), source))?;
            Ok((temporary, output))
        })
        .await
    }
}
