//! What all calls have in common in the OpenAPI document.

use utoipa::openapi::{
    OpenApi, RefOr, Required,
    header::HeaderBuilder,
    path::{Operation, ParameterBuilder, ParameterIn},
    schema::{Components, ObjectBuilder, Type},
    security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme},
};

/// Whether calls need a bearer token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Access {
    Bearer,
    Anybody,
}

/// Adds to each operation what its handler cannot say.
pub(super) fn complete(document: &mut OpenApi, access: Access) {
    if access == Access::Bearer {
        let scheme = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        document.components.get_or_insert_with(Components::new).add_security_scheme("bearer", scheme);
    }
    for item in document.paths.paths.values_mut() {
        let changing = [&mut item.post, &mut item.put, &mut item.patch, &mut item.delete];
        for operation in changing.into_iter().flatten() {
            name(operation);
            responses(operation);
            if access == Access::Bearer {
                operation.security = Some(vec![bearer()]);
                operation.parameters.get_or_insert_default().push(idempotency_key());
            }
        }
        if let Some(operation) = &mut item.get {
            name(operation);
            responses(operation);
            if access == Access::Bearer {
                operation.security = Some(vec![bearer()]);
            }
        }
    }
}

fn bearer() -> SecurityRequirement {
    SecurityRequirement::new::<_, [&str; 0], &str>("bearer", [])
}

/// Handlers are named within their file; in the document a name must be unique.
fn name(operation: &mut Operation) {
    let tag = operation.tags.as_ref().and_then(|tags| tags.first());
    if let (Some(tag), Some(id)) = (tag, &mut operation.operation_id) {
        *id = format!("{tag}_{id}");
    }
}

/// Answers are described, and errors are problem documents, which have a media
/// type of their own.
fn responses(operation: &mut Operation) {
    for (status, response) in &mut operation.responses.responses {
        // The format requires one of each.
        if let RefOr::T(response) = response
            && response.description.is_empty()
        {
            let reason = status.parse::<http::StatusCode>().ok().and_then(|status| status.canonical_reason());
            reason.unwrap_or("Answer").clone_into(&mut response.description);
        }
    }
    if let Some(RefOr::T(response)) = operation.responses.responses.get_mut("default") {
        response.description = "what went wrong; `code` says it to programs".to_owned();
        if let Some(content) = response.content.shift_remove("application/json") {
            response.content.insert("application/problem+json".to_owned(), content);
        }
        let after = HeaderBuilder::new().description(Some("in seconds; with status 503")).build();
        response.headers.insert("Retry-After".to_owned(), RefOr::T(after));
    }
}

fn idempotency_key() -> RefOr<utoipa::openapi::path::Parameter> {
    let text = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(Some(200));
    let parameter = ParameterBuilder::new()
        .name("Idempotency-Key")
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some("A call repeated with the same key is done once, and answered alike."))
        .schema(Some(text.build()));
    RefOr::T(parameter.build())
}
