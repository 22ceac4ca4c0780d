//! Where traces go and how many are made, from the environment variables that OpenTelemetry has
//! for it.

use std::fmt;

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;

use super::Service;

/// Share of requests that are traced unless told otherwise, once there is an endpoint: 1 in 1000,
/// which costs less than can be measured.
pub const RATIO_DEFAULT: f64 = 0.001;

/// Port at which collectors take OTLP over gRPC.
const OTLP_PORT: u16 = 4317;

/// What is read from the environment. An empty variable is one that is not set.
///
/// | variable | meaning |
/// | --- | --- |
/// | `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, else `OTEL_EXPORTER_OTLP_ENDPOINT` | where to send traces, `http://host:4317`; without it there are none |
/// | `JAEGER_AGENT_HOST` | `jaeger` is short for the endpoint `http://jaeger:4317`, if none is given |
/// | `OTEL_TRACES_SAMPLER` | `always_on`, `always_off`, `traceidratio`, or one of them behind `parentbased_` |
/// | `OTEL_TRACES_SAMPLER_ARG` | the ratio, from 0 to 1; default 0.001 |
/// | `OTEL_SERVICE_NAME` | in place of the program's name |
/// | `OTEL_RESOURCE_ATTRIBUTES` | `key=value,key=value` |
/// | `OTEL_SDK_DISABLED` | `true`: none |
/// | `OTEL_TRACES_EXPORTER` | `none`: none |
///
/// A request that comes with a context is traced as that says, whatever the sampler, and so are
/// requests of a volume that were asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// `None`: no traces.
    endpoint: Option<String>,
    ratio: f64,
    service_name: Option<String>,
    attributes: Vec<(String, String)>,
}

/// A variable that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidTrace {
    /// Where to send traces is no address, or one that is not reached like this.
    #[error(
        "{name} is {value:?}: allowed is http://HOST:PORT (TLS is up to a proxy or collector \
         beside)"
    )]
    Endpoint {
        /// The variable.
        name: &'static str,
        /// What it is set to.
        value: String,
    },
    /// A sampler that is not known.
    #[error(
        "OTEL_TRACES_SAMPLER is {0:?}: allowed are always_on, always_off, traceidratio, and each \
         of them behind parentbased_"
    )]
    Sampler(String),
    /// A ratio that is none.
    #[error("OTEL_TRACES_SAMPLER_ARG is {0:?}: allowed is a number from 0 to 1")]
    Ratio(String),
    /// Attributes that are no list of pairs.
    #[error("OTEL_RESOURCE_ATTRIBUTES is {0:?}: allowed is key=value,key=value")]
    Attributes(String),
}

impl Default for Settings {
    /// No traces.
    fn default() -> Self {
        Self { endpoint: None, ratio: 0.0, service_name: None, attributes: Vec::new() }
    }
}

impl Settings {
    /// What the process's environment says.
    ///
    /// # Errors
    /// The first variable that makes no sense.
    pub fn from_env() -> Result<Self, InvalidTrace> {
        Self::read(|name| std::env::var(name).ok())
    }

    pub(super) fn read(
        variable: impl Fn(&'static str) -> Option<String>,
    ) -> Result<Self, InvalidTrace> {
        let variable = |name| {
            let value = variable(name)?.trim().to_owned();
            (!value.is_empty()).then_some(value)
        };
        let is = |name, wanted: &str| {
            variable(name).is_some_and(|value| value.eq_ignore_ascii_case(wanted))
        };
        if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
            return Ok(Self::default());
        }
        let named = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];
        let mut endpoint = None;
        for name in named {
            if endpoint.is_none()
                && let Some(value) = variable(name)
            {
                endpoint = Some(checked_endpoint(name, value)?);
            }
        }
        if endpoint.is_none()
            && let Some(host) = variable("JAEGER_AGENT_HOST")
        {
            let name = "JAEGER_AGENT_HOST";
            let host = if host.contains(':') { format!("[{host}]") } else { host };
            endpoint = Some(checked_endpoint(name, format!("http://{host}:{OTLP_PORT}"))?);
        }
        let ratio = match variable("OTEL_TRACES_SAMPLER_ARG") {
            None => RATIO_DEFAULT,
            Some(value) => match value.parse::<f64>() {
                Ok(ratio) if (0.0..=1.0).contains(&ratio) => ratio,
                _ => return Err(InvalidTrace::Ratio(value)),
            },
        };
        let sampler = variable("OTEL_TRACES_SAMPLER");
        let own = |name| str::strip_prefix(name, "parentbased_").unwrap_or(name);
        let ratio = match sampler.as_deref().map(own) {
            None | Some("traceidratio") => ratio,
            Some("always_on") => 1.0,
            Some("always_off") => 0.0,
            Some(_) => return Err(InvalidTrace::Sampler(sampler.unwrap_or_default())),
        };
        let attributes = variable("OTEL_RESOURCE_ATTRIBUTES");
        let attributes = attributes.map_or_else(|| Ok(Vec::new()), |list| pairs(&list))?;
        Ok(Self { endpoint, ratio, service_name: variable("OTEL_SERVICE_NAME"), attributes })
    }

    /// Traces to `endpoint`, of so many of the requests (0 to 1): for tests.
    #[must_use]
    pub fn to(endpoint: &str, ratio: f64) -> Self {
        Self { endpoint: Some(endpoint.to_owned()), ratio, ..Self::default() }
    }

    /// Where traces go, if anywhere.
    #[must_use]
    pub fn endpoint(&self) -> Option<&str> {
        self.endpoint.as_deref()
    }

    /// Share of the requests that are traced without being asked for, from 0 to 1.
    #[must_use]
    pub const fn ratio(&self) -> f64 {
        self.ratio
    }

    pub(super) fn resource(&self, service: Service<'_>) -> Resource {
        let name = self.service_name.clone().unwrap_or_else(|| service.name.to_owned());
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let own = [
            KeyValue::new("service.name", name),
            KeyValue::new("service.instance.id", service.instance.to_owned()),
            KeyValue::new("service.version", service.version),
            KeyValue::new("host.name", host),
            KeyValue::new("process.pid", i64::from(std::process::id())),
        ];
        // What the environment says of the instance or the host is meant to be said.
        let given = self.attributes.iter().map(|(k, v)| KeyValue::new(k.clone(), v.clone()));
        Resource::builder_empty().with_attributes(own).with_attributes(given).build()
    }
}

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            None => f.pad("none"),
            Some(endpoint) => write!(f, "{} of requests to {endpoint}", self.ratio),
        }
    }
}

fn checked_endpoint(name: &'static str, value: String) -> Result<String, InvalidTrace> {
    let rest = value.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
    let is_sound = rest.is_some_and(|rest| {
        !rest.is_empty()
            && !rest.contains(['/', '@'])
            && rest.parse::<axum::http::uri::Authority>().is_ok()
    });
    if is_sound { Ok(value) } else { Err(InvalidTrace::Endpoint { name, value }) }
}

fn pairs(list: &str) -> Result<Vec<(String, String)>, InvalidTrace> {
    let pair = |pair: &str| match pair.split_once('=') {
        Some((key, value)) if !key.trim().is_empty() => {
            Ok((key.trim().to_owned(), value.trim().to_owned()))
        }
        _ => Err(InvalidTrace::Attributes(list.to_owned())),
    };
    list.split(',').filter(|part| !part.trim().is_empty()).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, InvalidTrace> {
        Settings::read(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn without_an_endpoint_there_are_no_traces() {
        assert_eq!(read(&[]).unwrap().endpoint(), None);
        let empty = [("OTEL_EXPORTER_OTLP_ENDPOINT", ""), ("JAEGER_AGENT_HOST", " ")];
        assert_eq!(read(&empty).unwrap().endpoint(), None);
        let disabled = [("JAEGER_AGENT_HOST", "jaeger"), ("OTEL_SDK_DISABLED", "true")];
        assert_eq!(read(&disabled).unwrap().endpoint(), None);
        let none = [("JAEGER_AGENT_HOST", "jaeger"), ("OTEL_TRACES_EXPORTER", "none")];
        assert_eq!(read(&none).unwrap().endpoint(), None);
        let twice = [("OTEL_TRACES_SAMPLER", "parentbased_parentbased_always_on")];
        assert!(read(&twice).is_err());
    }

    #[test]
    fn the_endpoint_comes_from_whichever_variable_says_most() {
        let host = ("JAEGER_AGENT_HOST", "jaeger");
        assert_eq!(read(&[host]).unwrap().endpoint(), Some("http://jaeger:4317"));
        assert_eq!(read(&[host]).unwrap().ratio(), RATIO_DEFAULT);
        let v6 = read(&[("JAEGER_AGENT_HOST", "::1")]).unwrap();
        assert_eq!(v6.endpoint(), Some("http://[::1]:4317"));
        let otlp = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317");
        assert_eq!(read(&[host, otlp]).unwrap().endpoint(), Some("http://collector:4317"));
        let traces = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://traces:1");
        assert_eq!(read(&[traces, otlp]).unwrap().endpoint(), Some("http://traces:1"));
    }

    #[test]
    fn the_sampler_is_what_the_standard_says() {
        let host = ("JAEGER_AGENT_HOST", "jaeger");
        let ratio = |sampler, argument| {
            let argument = ("OTEL_TRACES_SAMPLER_ARG", argument);
            read(&[host, ("OTEL_TRACES_SAMPLER", sampler), argument]).map(|s| s.ratio())
        };
        assert_eq!(ratio("always_on", ""), Ok(1.0));
        assert_eq!(ratio("parentbased_always_on", "0.5"), Ok(1.0));
        assert_eq!(ratio("always_off", ""), Ok(0.0));
        assert_eq!(ratio("parentbased_traceidratio", "0.25"), Ok(0.25));
        assert_eq!(ratio("", "1"), Ok(1.0));
        assert_eq!(ratio("traceidratio", ""), Ok(RATIO_DEFAULT));
        for (sampler, argument) in [("often", ""), ("", "2"), ("", "-1"), ("", "NaN"), ("", "x")] {
            ratio(sampler, argument).unwrap_err();
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for wrong in
            ["collector:4317", "https://collector:4317", "http://", "http://a/b", "http://a b"]
        {
            let error = read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", wrong)]).unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with("OTEL_EXPORTER_OTLP_ENDPOINT is"), "{wrong}: {text}");
        }
        read(&[("OTEL_RESOURCE_ATTRIBUTES", "a=b,c")]).unwrap_err();
    }

    #[test]
    fn the_resource_says_who_it_is() {
        let settings = read(&[
            ("JAEGER_AGENT_HOST", "jaeger"),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test, host.name=here"),
        ]);
        let service = Service { name: "nbd-lb", instance: "lb-1", version: "1.2.3" };
        let resource = settings.unwrap().resource(service);
        let get = |key: &'static str| resource.get(&key.into()).map(|value| value.to_string());
        assert_eq!(get("service.name").as_deref(), Some("nbd-lb"));
        assert_eq!(get("service.instance.id").as_deref(), Some("lb-1"));
        assert_eq!(get("service.version").as_deref(), Some("1.2.3"));
        assert_eq!(get("deployment.environment.name").as_deref(), Some("test"));
        assert_eq!(get("host.name").as_deref(), Some("here"));
        let named = read(&[("OTEL_SERVICE_NAME", "storage")]).unwrap().resource(service);
        assert_eq!(
            named.get(&"service.name".into()).map(|v| v.to_string()).as_deref(),
            Some("storage")
        );
    }
}
