//! What all requests share, and the way from a parsed request to its running sequences.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::future::try_join_all;
use identity::Tls;
use tokio::sync::Semaphore;

use crate::clock::unix_seconds;
use crate::config::{GatewayConfig, GatewayError};
use crate::error::ApiError;
use crate::face::{Face, Meant};
use crate::generate::{Context, Job, Sequence};
use crate::health::Health;
use crate::idempotency::Answers;
use crate::leader::Leaders;
use crate::life::{Life, Vitals};
use crate::metrics::Metrics;
use crate::view::{Named, NoRoute, Outlook, View};
use crate::way::Ways;

/// How long a scrape waits for the group leader's counts.
const COUNTS_TIMEOUT: Duration = Duration::from_millis(500);

/// What all requests share.
pub(crate) struct Gateway {
    pub(crate) config: GatewayConfig,
    pub(crate) metrics: Metrics,
    /// Unix seconds of the start, which models carry as their date.
    pub(crate) created: u64,
    name: String,
    /// One for each model; the first is the own deployment's.
    faces: Vec<Arc<Face>>,
    ways: Arc<Ways>,
    health: Health,
    pub(crate) answers: Answers,
    life: Life,
    tokenizing: Arc<Semaphore>,
    /// Room for request bodies, in KiB.
    pub(crate) bodies: Arc<Semaphore>,
}

impl Gateway {
    pub(crate) fn new(
        config: GatewayConfig,
        view: Box<dyn View>,
        vitals: Vitals,
        tls: Tls,
    ) -> Result<Self, GatewayError> {
        let name = config.served_names.first().ok_or(GatewayError::NoName)?.clone();
        let faces = config.models.iter().map(|model| Face::new(model, &config.limits));
        let faces = faces.collect::<Result<Vec<_>, _>>()?;
        if faces.is_empty() {
            return Err(GatewayError::NoModel);
        }
        let metrics = Metrics::new(&name);
        let (leaders, patience) = (Leaders::new(tls), config.limits.patience);
        let ways = Ways::new(view, leaders, metrics.clone(), patience);
        Ok(Self {
            created: unix_seconds(SystemTime::now()),
            faces: faces.into_iter().map(Arc::new).collect(),
            tokenizing: Arc::new(Semaphore::new(config.limits.tokenizing.max(1))),
            bodies: Arc::new(Semaphore::new(kib(config.limits.bodies_bytes) as usize)),
            ways: Arc::new(ways),
            health: Health::default(),
            answers: Answers::default(),
            life: Life::watch(vitals).map_err(GatewayError::Thread)?,
            name,
            metrics,
            config,
        })
    }

    /// Names that requests may use: its own, and those that the cluster knows, of models that this
    /// gateway has.
    pub(crate) fn names(&self) -> Vec<String> {
        let view = self.ways.view();
        let own = &self.config.served_names;
        let more = view.names().into_iter().filter(|name| !own.contains(name));
        let served =
            |named: &Named| !named.draining && self.faces.iter().any(|face| face.is_of(named));
        let more = more.filter(|name| view.meant(name).is_some_and(|named| served(&named)));
        own.iter().cloned().chain(more).collect()
    }

    /// What the name in a request means at this moment. What the cluster says comes first; this
    /// gateway's own names all mean its first one's deployment.
    ///
    /// # Errors
    /// 404: nothing that could be served here.
    pub(crate) fn meant(&self, model: &str) -> Result<Meant, ApiError> {
        let own = self.config.served_names.iter().any(|name| name == model);
        let view = self.ways.view();
        let named = view.meant(model).or_else(|| view.meant(&self.name).filter(|_| own));
        match named {
            Some(named) => {
                let face = self.faces.iter().find(|face| face.is_of(&named));
                let face = face.ok_or_else(ApiError::no_model)?;
                Ok(Meant { face: Arc::clone(face), named })
            }
            // Not deployed, or not yet: that is told to whoever looks for a group.
            None if own => Ok(self.default()),
            None => Err(ApiError::no_model()),
        }
    }

    /// What is meant where no name is said: the first model.
    pub(crate) fn default(&self) -> Meant {
        let face = Arc::clone(&self.faces[0]);
        let (deployment, draining) = (self.name.clone(), false);
        let (digest, context) = (face.digest.clone(), face.context);
        Meant { face, named: Named { deployment, digest, context, draining } }
    }

    /// The deployment that health and counts are about: the own one; where that is not deployed,
    /// the first that an alias means and that is served here.
    fn subject(&self) -> String {
        let view = self.ways.view();
        if let Some(named) = view.meant(&self.name) {
            return named.deployment;
        }
        let aliases = view.names().into_iter().filter_map(|name| {
            let named = view.meant(&name)?;
            (named.deployment != name).then_some(named)
        });
        let mut served = aliases.filter(|named| self.faces.iter().any(|face| face.is_of(named)));
        served.next().map_or_else(|| self.name.clone(), |named| named.deployment)
    }

    /// Whether the deployment that matters here serves or has served, or why it has not so far.
    pub(crate) fn started(&self) -> Result<(), ApiError> {
        let subject = self.subject();
        match self.ways.route(&subject) {
            Ok(_) | Err(NoRoute { outlook: Outlook::Returns, .. }) => Ok(()),
            Err(NoRoute { why, .. }) => {
                let parts = [vec![why], self.ways.view().loading(&subject)].concat();
                let why = parts.join("; ");
                Err(ApiError::unavailable(format!("the model is not ready: {why}")))
            }
        }
    }

    /// Whether this process gets on, or what of it does not.
    pub(crate) fn alive(&self) -> Result<(), ApiError> {
        self.life.stalled().map_or(Ok(()), |why| Err(ApiError::stalled(why)))
    }

    /// Whether the deployment that matters here would answer.
    pub(crate) async fn healthy(&self) -> Result<(), ApiError> {
        self.health.check(&self.ways, &self.subject()).await
    }

    /// The text of a scrape.
    pub(crate) async fn scrape(&self) -> String {
        let counts = match self.ways.route(&self.subject()) {
            Ok(route) => self.ways.counts(&route, COUNTS_TIMEOUT).await,
            Err(_) => None,
        };
        self.metrics.text(counts.as_ref())
    }

    /// Runs tokenising work on a thread of its own, a few at a time. A panic of the libraries on
    /// some text fails that request alone.
    pub(crate) async fn tokenizing<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = Arc::clone(&self.tokenizing).acquire_owned().await;
        let failed = || ApiError::internal("the text could not be tokenised");
        let permit = permit.map_err(|_| failed())?;
        let job = tokio::task::spawn_blocking(move || {
            // Held by the thread: a client that leaves does not free a busy thread's place.
            let _permit = permit;
            work()
        });
        job.await.map_err(|_| failed())?
    }

    /// Starts all sequences of a request; where one is refused, all are dropped.
    pub(crate) async fn open(
        &self,
        meant: &Meant,
        request_id: &str,
        jobs: Vec<Job>,
    ) -> Result<Vec<Sequence>, ApiError> {
        let open = jobs.into_iter().map(|job| {
            let context = Context {
                request_id: request_id.to_owned(),
                deployment: meant.named.deployment.clone(),
                ways: Arc::clone(&self.ways),
                tokenizer: Arc::clone(&meant.face.tokenizer),
                meter: self.metrics.meter(job.request.prompt.len()),
            };
            Sequence::open(job, context)
        });
        try_join_all(open).await
    }
}

/// KiB that so many bytes take.
pub(crate) fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}
