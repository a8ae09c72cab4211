{{/*
What values.schema.json cannot say, or not in words that help: values that contradict each other. Included by the coordinator's Deployment.
*/}}
{{- define "shardmesh.check" -}}
{{- $shards := int .Values.shards -}}
{{- $power := 1 -}}
{{- range until 20 -}}
{{- if lt $power $shards -}}{{- $power = mul $power 2 | int -}}{{- end -}}
{{- end -}}
{{- if and (ne $power $shards) (not .Values.allowUneven) -}}
{{- fail (printf "shards is %d: a power of two is wanted; set allowUneven=true for any other number" $shards) -}}
{{- end -}}
{{- $model := .Values.model -}}
{{- if and (eq $model.source "existingClaim") (not $model.claim.existing) -}}
{{- fail "model.source is existingClaim: model.claim.existing must name the claim" -}}
{{- end -}}
{{- if and (ne $model.source "existingClaim") (or $model.claim.existing $model.path) -}}
{{- fail (printf "model.claim.existing and model.path belong to model.source=existingClaim, found model.source=%s" $model.source) -}}
{{- end -}}
{{- if and (ne $model.source "existingClaim") (not $model.hubId) -}}
{{- fail (printf "model.source is %s: model.hubId must say which model" $model.source) -}}
{{- end -}}
{{- if and (eq $model.source "hub") (eq $model.delivery "shared") -}}
{{- fail "model.source=hub keeps the files where only the coordinator sees them: set model.delivery=stream, or model.source=newClaim" -}}
{{- end -}}
{{- if and (eq $model.source "hub") (ne $model.revision "main") -}}
{{- fail "model.revision needs model.source=newClaim: at model.source=hub the coordinator takes the hub's main" -}}
{{- end -}}
{{- if and (eq $model.source "newClaim") (eq $model.claim.accessMode "ReadOnlyMany") -}}
{{- fail "model.claim.accessMode=ReadOnlyMany cannot be filled: take ReadWriteOnce or ReadWriteMany" -}}
{{- end -}}
{{- if and .Values.coordinator.warmSpares (eq $model.delivery "stream") -}}
{{- fail "coordinator.warmSpares has spares read files that they mount: it needs model.delivery=shared" -}}
{{- end -}}
{{- if and $model.hubToken.existingSecret $model.hubToken.value -}}
{{- fail "model.hubToken: existingSecret or value, not both" -}}
{{- end -}}
{{- $several := or (gt (int .Values.coordinator.replicas) 1) (ne .Values.autoscaling.mode "none") -}}
{{- if and $several (eq .Values.discovery "dns") -}}
{{- fail "several coordinators need discovery=kubernetes: a Lease says which of them assigns plans" -}}
{{- end -}}
{{- if eq .Values.tls.mode "existing" -}}
{{- if not (and .Values.tls.coordinatorSecret .Values.tls.workerSecret) -}}
{{- fail "tls.mode is existing: tls.coordinatorSecret and tls.workerSecret must name the Secrets" -}}
{{- end -}}
{{- else if or .Values.tls.coordinatorSecret .Values.tls.workerSecret .Values.tls.callerSecret -}}
{{- fail (printf "tls.coordinatorSecret, tls.workerSecret and tls.callerSecret belong to tls.mode=existing, found tls.mode=%s" .Values.tls.mode) -}}
{{- end -}}
{{- if and (eq .Values.tls.mode "off") (or .Values.tls.publicSecret .Values.tls.requireCallerCertificate) -}}
{{- fail "tls.publicSecret and tls.requireCallerCertificate need TLS, found tls.mode=off" -}}
{{- end -}}
{{- if and .Values.apiKeys.existingCallerSecret (not .Values.apiKeys.existingSecret) -}}
{{- fail "apiKeys.existingCallerSecret goes with apiKeys.existingSecret: a key the chart makes has a Secret already" -}}
{{- end -}}
{{- if and (ne .Values.autoscaling.mode "none") (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- fail (printf "autoscaling.minReplicas is %d, more than maxReplicas, %d" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and (eq .Values.autoscaling.mode "keda") (not .Values.autoscaling.prometheusAddress) -}}
{{- fail "autoscaling.mode is keda: autoscaling.prometheusAddress must say where Prometheus answers" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.enabled: ingress.host must be set" -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) -}}
{{- fail "grpcRoute.enabled: grpcRoute.parentRefs must name a Gateway" -}}
{{- end -}}
{{- if and .Values.grpcRoute.caConfigMap .Values.tls.publicSecret -}}
{{- fail "grpcRoute.caConfigMap is for the mesh's own certificate, tls.publicSecret puts another in its place: leave one of them" -}}
{{- end -}}
{{- end -}}
